"""Studies: many runs as one job. `qfast.study` and `qfast study` run seeds, grids, searches and rolling windows."""
