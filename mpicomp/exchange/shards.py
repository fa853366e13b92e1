"""How a bucket is cut into one shard for each rank: along columns, or just in equal parts."""

from mpicomp.layout import Layout


class Shard:
    """The columns that one rank owns: a sub-layout, and where its elements lie in the bucket.

    A piece of a tensor of shape [rows, ...] that holds `width` of its columns has the shape
    [rows, width], with ones appended to keep the number of dimensions (some compressors look at
    it); a whole tensor keeps its shape.
    """

    def __init__(self, pieces):
        self.pieces = pieces  # (segment, first column, last column + 1)
        self.layout = Layout.of((s.name, _shape(s, a, b)) for s, a, b in pieces)

    def gather(self, bucket, shard):
        """Copy this shard's elements out of the bucket's flat array."""
        for (segment, a, b), part in zip(self.pieces, self.layout.segments):
            rows, _ = segment.matrix
            shard[part.slice].reshape(rows, -1)[...] = _matrix(bucket, segment)[:, a:b]

    def scatter(self, shard, bucket):
        """Copy this shard's elements to their places in the bucket's flat array."""
        for (segment, a, b), part in zip(self.pieces, self.layout.segments):
            rows, _ = segment.matrix
            _matrix(bucket, segment)[:, a:b] = shard[part.slice].reshape(rows, -1)


def cut(layout, ranks) -> list[Shard]:
    """One shard a rank: a column belongs to the rank in whose share of the bucket its middle lies.

    Columns are never split (CNTK's rule: two means a column), so a bias has one owner, and
    shares are equal within a column.
    """
    pieces = [[] for _ in range(ranks)]
    for segment in layout.segments:
        if not segment.size:
            continue
        rows, columns = segment.matrix
        first = 0
        for rank in range(ranks):
            # columns whose middle start + (j + 1/2) * rows lies before the end of the rank's share
            end = layout.size * (rank + 1) / ranks
            last = min(max(int(-(-(end - segment.start - rows / 2) // rows)), first), columns)
            if rank == ranks - 1:
                last = columns
            if last > first:
                pieces[rank].append((segment, first, last))
            first = last
    return [Shard(owned) for owned in pieces]


def equal_borders(layout, ranks) -> list[int]:
    """Where each rank's part of ceil(size / ranks) elements begins, and the end of the last."""
    share = -(-layout.size // ranks)
    return [min(rank * share, layout.size) for rank in range(ranks + 1)]


def part(layout, first, last) -> Layout:
    """The layout of the elements from `first` to before `last` of a bucket.

    Of a tensor that is cut, whole rows stay a tensor [rows, ...]; the rest of a row is a vector.
    """
    pieces = []
    for segment in layout.segments:
        a, b = max(first - segment.start, 0), min(last - segment.start, segment.size)
        if a >= b:
            continue
        _, columns = segment.matrix
        begin, end = -(-a // columns) * columns, b // columns * columns
        if (a, b) == (0, segment.size):
            pieces.append((segment.name, segment.shape))
        elif begin >= end:
            pieces.append((segment.name, (b - a,)))
        else:
            shapes = ((begin - a,), ((end - begin) // columns, *segment.shape[1:]), (b - end,))
            pieces += [(segment.name, shape) for shape in shapes if shape[0]]
    return Layout.of(pieces)


def _shape(segment, a, b):
    rows, columns = segment.matrix
    if b - a == columns:
        return segment.shape
    return (rows, b - a) + (1,) * (len(segment.shape) - 2)


def _matrix(bucket, segment):
    return bucket[segment.slice].reshape(segment.matrix)
