"""The networks: one file an architecture, with a `Config`, a `build` and its `macs_per_sample`.

A model is a module `forward(x [B, C, H, W], tau [B], labels int64 [B] or None) -> [B, C or 2C, H, W]`
that knows nothing of noise or losses. `build` is given `seed`, `device`, the `dtype` of the products
and `backends` for the ops that the file names in `KERNELS`, if it names any. The word `model.kind`
of a configuration is the name of a file of this folder.
"""
