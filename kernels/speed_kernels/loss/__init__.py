"""The loss op: the training loss and its gradient by the network's output."""
