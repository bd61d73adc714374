"""The shard format: ordinary WebDataset tars plus an index of our own with offsets, checksums and
counts.

`tar` walks an archive strictly, `scan` turns a tar into index entries, `index` is the set's
`index.json`, `writer` builds a set so that a killed process leaves nothing half done, `pictures`
turns image files into arrays.
"""
