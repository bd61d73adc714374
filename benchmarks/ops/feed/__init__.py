"""The whole feed: order, reading, decoding, the way to the device."""
