"""One run of a plan, forward and back.

`prepare` makes a `Run`: checked, with its tables, noise and models. `steps` says what step k does,
`loop` takes the steps, `exact_gradient` goes back through them, `captured` replays them from CUDA
graphs. A run knows plans, not methods.
"""
