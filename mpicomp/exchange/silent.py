"""Silent: sends nothing, to measure everything but the network. Replicas drift apart."""

from mpicomp.exchange.base import Cost, Exchange
from mpicomp.transport import packet, staging


class Silent(Exchange):
    """Nothing is sent: each rank decodes its own packet, as often as there are ranks."""

    name = "silent"
    on_device = True

    @classmethod
    def cost(cls, ranks):
        return Cost(0, calls=0, decodes=ranks)

    def run(self, bucket, step, flags):
        codec = bucket.codec
        if codec.shared is not None:
            codec.measure(flags)
        self.encode(codec, step, flags)
        bucket.headers = [packet.Header.read(staging.host(codec.outbox))]
        return
        yield  # a generator that never waits

    def decode(self, bucket, step, weight):
        bucket.grad[...] = 0
        codec, key = bucket.codec, bucket.codec.key(step, self.wire.rank)
        payload = staging.device(codec.payload)[:bucket.headers[0].length]
        with staging.decoding(bucket.grad):
            for _ in range(self.wire.size):
                codec.compressor.decode_add(payload, bucket.grad, bucket.layout, key, weight)
