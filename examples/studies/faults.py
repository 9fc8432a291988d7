"""
Puts small faults into a copy of the package, one at a time, and runs the tests that should notice each.

    python examples/studies/faults.py            # all of them
    python examples/studies/faults.py --only mask

The faults are in `fault_list.py`; each lies at a subtle spot. A fault that no test notices is printed as "passed".
"""

from __future__ import annotations

import argparse
import shlex

from fault_list import FAULTS, Fault
from package_copy import PackageCopy, package_copy


def is_noticed(fault: Fault, copy: PackageCopy) -> bool:
    """Whether a test fails with the fault in the copy."""
    with copy.changed(fault.file, copy.source(fault.file).replace(fault.old, fault.new)):
        status, output = copy.run(shlex.split(fault.tests))
    if status not in (0, 1):
        raise SystemExit(f"pytest could not run {fault.tests} with {fault.name!r}:\n{output}")
    return status == 1


def check(faults: list[Fault], copy: PackageCopy) -> None:
    """Ends the run if a fault has no place, or if a test fails without a fault and so would seem to notice each."""
    for fault in faults:
        count = copy.source(fault.file).count(fault.old)
        if count != 1:
            raise SystemExit(f"{fault.file} has {count} times, not once: {fault.old!r}")
    for tests in sorted({fault.tests for fault in faults}):
        status, output = copy.run(shlex.split(tests))
        if status != 0:
            raise SystemExit(f"{tests} does not pass without a fault:\n{output}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="Faults whose subject or name contains this text.")
    only = parser.parse_args().only
    groups = {
        subject: [fault for fault in faults if only in f"{subject}: {fault.name}"]
        for subject, faults in FAULTS.items()
    }
    noticed = dict.fromkeys(groups, 0)
    with package_copy() as copy:
        check([fault for faults in groups.values() for fault in faults], copy)
        for subject, faults in groups.items():
            for fault in faults:
                found = is_noticed(fault, copy)
                noticed[subject] += found
                print(f"{'noticed' if found else 'passed '}  {subject}: {fault.name}", flush=True)
    for subject, faults in groups.items():
        print(f"{noticed[subject]} of {len(faults)} faults noticed: {subject}")
    total = sum(map(len, groups.values()))
    print(f"{sum(noticed.values())} of {total} faults noticed")
    raise SystemExit(sum(noticed.values()) < total)


if __name__ == "__main__":
    main()
