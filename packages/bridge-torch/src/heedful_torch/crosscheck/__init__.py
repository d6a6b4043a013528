"""Do the backends agree? Outputs, log-sum-exp and every gradient, against a float64 oracle.

A kernel's author registers the kernel, and holds it to the contract in a test:

    import heedful
    from heedful_torch.crosscheck import crosscheck

    def test_my_kernel():
        heedful.register(MyKernel())  # its name is "torch:mine"
        report = crosscheck(["torch:mine"])
        assert report.agree, report

What it refuses is no failure, and is listed by `report.refusals`. `python -m pytest` then prints the
whole table where it fails. On the command line the same is

    heedful crosscheck --import my_package.kernel --backend torch:mine
"""

from collections.abc import Callable, Iterable, Sequence

import heedful
