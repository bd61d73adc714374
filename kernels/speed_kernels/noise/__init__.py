"""The noise op: draw a row of the step table, make the noise, write the noised sample."""
