"""The dropout op: addressed dropout of images."""
