"""Studies: methods x seeds x settings from one file, run cell by cell and compared with intervals.

`study.py` is the file and its check, `runs.py` trains the cells, `statistics.py` holds the crossings and the intervals,
`results.py` turns curves into findings, `report.py` and `pictures.py` write them. The YAML files here are the studies
that ship with the package.
"""
