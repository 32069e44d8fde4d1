"""How often the verdict on draws of rows is a false alarm, or misses guides that are wrong.

Every row has a normal posterior in closed form, and a normal guide of another width: with the
ratio r of the two, the Pareto shape of the weights is 1 - r^2 for each latent, below a width of
one. Some rows may have a guide of a width of 0.3, with a shape of 0.91.
"""

import argparse

import numpy as np

from flowvi.diagnostics import VERDICTS, diagnose_rows

ROWS = 500


def draws(
    rng: np.random.Generator, widths: np.ndarray, number: int, dim: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Log weights (1, draw, row) and latents (1, draw, row, dim) of guides of such widths."""
    noise = rng.normal(size=(1, number, len(widths), dim))
    z = noise * widths[:, None]
    log_w = ((noise**2 - z**2) / 2 + np.log(widths)[:, None]).sum(-1)
    return log_w, {"z": z}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--dim", type=int, default=1)
    given = parser.parse_args()
    rng = np.random.default_rng(0)
    labels = [str(n) for n in range(ROWS)]
    print("| width | bad rows | draws | rows not trusted | " + " | ".join(VERDICTS) + " |")
    print("| --- " * 7 + "|")
    for width, bad in ((0.95, 0), (0.9, 0), (0.8, 0), (0.5, 0), (0.9, 1), (0.9, 5)):
        for number in (200, 1000, 4000):
            widths = np.full(ROWS, width)
            widths[:bad] = 0.3
            failed, verdicts = 0, []
            for _ in range(given.repeats):
                log_weights, values = draws(rng, widths, number, given.dim)
                found = diagnose_rows(log_weights, values, labels)
                assert found.rows is not None
                verdicts.append(found.verdict)
                failed += int((found.rows.verdict == VERDICTS[2]).sum())
            share = failed / (ROWS * given.repeats)
            counts = " | ".join(str(verdicts.count(v)) for v in VERDICTS)
            print(f"| {width} | {bad} | {number} | {share:.2%} | {counts} |", flush=True)


if __name__ == "__main__":
    main()
