"""How a bucket is cut into one shard for each rank, along the columns of its tensors."""

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


def _shape(segment, a, b):
    rows, columns = segment.matrix
    if b - a == columns:
        return segment.shape
    return (rows, b - a) + (1,) * (len(segment.shape) - 2)


def _matrix(bucket, segment):
    return bucket[segment.slice].reshape(segment.matrix)
