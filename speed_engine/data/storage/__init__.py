"""The shard format: ordinary WebDataset tars plus an index of our own with offsets, checksums and
counts.

`tar` walks an archive strictly, `npy` reads headers and says what a named array may be, `scan` turns
a tar into index entries, `index` is the set's `index.json`, `scaling` its constants, `writer` builds
a set so that a killed process leaves nothing half done. Of what comes from elsewhere: `pictures` turns
image files into arrays, `places` finds them (`folders`, `tars`, `cifar`), `foreign` reads the latents of
other projects.
"""
