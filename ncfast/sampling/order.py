"""A fixed order of the tokens for iterative decoding (Besnier et al., arXiv 2503.17076, use it for images)."""


def halton_order(rows: int, num_tokens: int) -> list[int]:
    """All positions of a grid of `rows` x (num_tokens / rows), numbered row after row, spread evenly at any time.

    Cells are taken in the order in which the points of Halton's sequence (bases 3 and 2) first fall into them.
    Tokens that are not a grid of so many rows are one row.
    """
    if num_tokens % rows:
        rows = 1
    columns = num_tokens // rows
    order: dict[int, None] = {}
    point = 0
    while len(order) < num_tokens:
        row, column = int(radical_inverse(point, 3) * rows), int(radical_inverse(point, 2) * columns)
        order.setdefault(row * columns + column)
        point += 1
    return list(order)


def radical_inverse(number: int, base: int) -> float:
    """The digits of a whole number behind the point, the last one first: 0 <= result < 1."""
    result, scale = 0, 1
    while number:
        number, digit = divmod(number, base)
        result, scale = result * base + digit, scale * base
    return result / scale
