"""What the families' Triton kernels share: availability, launching, small jit helpers.

``support`` never imports triton, so that the package imports without it; ``launch`` and
``primitives`` do, and are imported by ``ops/<family>/triton.py`` alone.

How such a module is written: jit kernels named ``<op>_<fwd|bwd>_<what>_kernel`` made of small jit
helpers; one table of launch configurations per kernel and chip (``launch.Config``), chosen by a
plain function of the problem; and launchers with the signatures of ``reference.py``, which
allocate every output and start kernels through ``launch.launch`` only. The kernels, their tables
and production shapes are listed for the compile sweep in ``fmkernels/bench/gpu/<family>.py``.
"""
