"""What ``python -m bench traffic`` says of instructions: on a line of small shapes, as they are counted."""

from __future__ import annotations

import pytest

from bench.traffic import instructions
from bench.traffic.counting import A100, LAUNCH_SECONDS, predicted_seconds


@pytest.mark.parametrize("transposed", [False, True])
def test_a_tall_factor_lies_on_the_line_of_two_short_ones(transposed: bool) -> None:
    def count(n: int) -> instructions.Counted:
        return instructions.of_factor("stella_adamw_", n, 16, transposed)

    found, tall = instructions.on_the_line(*instructions.HEIGHTS, 14336, count), count(14336)
    # rows are whole tiles at these heights: what is not in proportion is a program's own and the sum of the partials
    for kernel in ("coupling_kernel", "gram_kernel", "update_kernel"):
        assert found[kernel] == pytest.approx(tall[kernel], rel=0.02), kernel
    assert found.total() == pytest.approx(tall.total(), rel=0.02)


@pytest.mark.slow
def test_a_layer_lies_on_the_line_of_few_tokens() -> None:
    def count(rows: int) -> instructions.Counted:
        return instructions.of_layer(rows, instructions.WIDTH, 16, 0.1)

    # a program's rows are whole tiles, whose last ones are masked, not left out: up to a twelfth of its share
    assert instructions.on_the_line(512, 768, 1024, count).total() == pytest.approx(count(1024).total(), rel=1 / 12)


def test_what_is_predicted_is_the_longer_of_bytes_and_instructions() -> None:
    moved, issued = 2.039e9, 2 * 108 * 1.41e9  # a millisecond, a second
    assert A100.issue_seconds(issued) == pytest.approx(1.0)
    kernels = [(moved, 0.0), (moved, issued)]
    assert predicted_seconds(A100, kernels, 2, 0.0) == pytest.approx(1.001 + 2 * LAUNCH_SECONDS)
    assert predicted_seconds(A100, kernels, 0, 312e12) == pytest.approx(2.0)
