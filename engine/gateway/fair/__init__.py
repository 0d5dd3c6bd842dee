"""Fair queueing before the replicas of a model.

:mod:`.costs` estimates what a request costs, :mod:`.line` says who is next (both pure), :mod:`.gate` lets the
requests of one gateway worker wait for their turn.
"""
