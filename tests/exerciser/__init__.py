"""Random operations on a file of a device here and on one of /dev/shm at once, in three processes, compared after each.

`operations.py` what can be done, and what it does to a model of bytes; `sides.py` how it is done here and in Linux;
`worker.py` one of the three processes; `exercise.py` runs a sequence and shrinks one that fails.
"""
