"""What this project costs, measured against what it cannot avoid: `python -m benchmarks`.

Every figure is a ratio of one run: CPU time, repeats interleaved, minimum taken, data in memory-backed storage where
there is some. Peaks of memory are measured in processes of their own. Nothing here is installed with the packages.
"""
