"""`python -m rlsys.doctor`: whether a machine, or each node of a Ray cluster, can run rlsys.

    facts.py            what is found here; touches the machine and the network
    checks.py           what follows from it; pure functions, a line with a remedy each
    __main__.py         the command

Nodes are asked through `workers.cluster_doctor`, since this library knows nothing of Ray.
"""
