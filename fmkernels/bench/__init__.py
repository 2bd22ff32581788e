"""Benchmarks, verification and demonstration: what the ``fmkernels`` command runs.

``workloads`` says what is measured, ``candidates`` and ``peers`` who is measured, ``numerics``
whether the numbers are right, ``timer`` and ``roofline`` how fast and against which ceiling;
``run`` joins them into the records of ``results``, which ``report`` and ``html`` write out.
``verify`` checks the ops one by one, ``demo`` trains real models. Only ``report``, ``html``,
``demo`` and the command line need the packages of the extra ``bench``.
"""
