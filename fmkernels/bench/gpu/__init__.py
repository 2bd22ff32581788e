"""What can be known about the GPU kernels on a machine without a GPU.

``stand_in`` takes the place of Triton's driver, ``registry`` lists kernels and production shapes,
``sweep`` compiles them all, ``inspect`` reads what the compiler produced, ``gates`` judges it.
``benchmarks/gpu_static.py`` is the command.
"""
