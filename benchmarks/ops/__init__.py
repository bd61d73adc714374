"""Single operations against their rivals."""
