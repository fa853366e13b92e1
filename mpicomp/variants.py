"""The seven systems: where each was published, and its variants as specifications."""

from textwrap import wrap

SEVEN = {  # method: (publication, {variant: specification})
    "terngrad": ("Wen et al., TernGrad, NIPS 2017", {
        "paper": "terngrad",
        "authors' code": "terngrad:scaler=code,packing=planar",
        "last layer float32": "rule(last<=2:dense; terngrad)",
        "MPI adds codes": "terngrad:exchange=allreduce",
        "GRACE": "terngrad:share=no,packing=int8"}),
    "onebit": ("Seide et al., 1-Bit SGD, Interspeech 2014", {
        "paper": "onebit:exchange=sharded,adagrad=yes",
        "paper, double buffer": "onebit:exchange=sharded,adagrad=yes,delay=1",
        "CNTK": "onebit:exchange=sharded,wire=cntk,min_rows=1",
        "CNTK, other levels": "onebit:exchange=sharded,wire=cntk,threshold=mean"}),
    "dorefa": ("Zhou et al., DoReFa-Net, arXiv 1606.06160, 2016; the network itself: mpicomp.nn", {
        "6 bits": "dorefa:bits=6",
        "MPI adds codes": "dorefa:exchange=allreduce",
        "a scale a rank": "dorefa:scale=own"}),
    "strom": ("Strom, Scalable Distributed DNN Training, Interspeech 2015", {
        "paper": "strom:exchange=peers",
        "paper, entropy code": "strom:exchange=peers,coding=rice",
        "LBANN": "strom:strict=no",
        "MXNet": "strom:tau=0.5,strict=no,coding=2bit",
        "tau adapts": "strom:density=0.001"}),
    "dryden": ("Dryden et al., Communication Quantization, MLHPC 2016", {
        "LBANN, August 2016": "dryden:exchange=sharded,own=raw",
        "LBANN, January 2017": "dryden:exchange=sharded,own=raw,version=2017",
        "with AdaGrad": "dryden:exchange=sharded,own=raw,adagrad=yes"}),
    "dropping": ("Aji & Heafield, Sparse Communication, EMNLP 2017", {
        "paper": "dropping:exchange=server",
        "Marian, by MPI": "dropping",
        "Marian, Apr. 2017": "dropping:exchange=server,cut=marian-feb2017,sample=marian",
        "local thresholds": "dropping:scope=layer",
        "1-bit survivors": "dropping:survivors=onebit"}),
    "adacomp": ("Chen et al., AdaComp, AAAI 2018", {
        "paper": "adacomp",
        "bins by name": "rule(embed.*:adacomp:bin=500; adacomp)",
        "no look ahead": "adacomp:factor=1"}),
}


def listing() -> str:
    """What `mpicomp methods` prints: the seven first, with sources, variants and options."""
    from dataclasses import fields

    from mpicomp.catalogue import common_options, method, methods
    from mpicomp.compressors.registry import find, registry
    from mpicomp.exchange import exchanges

    own, summaries, lines = registry(), methods(), ["The seven systems", ""]
    for name, (publication, variants) in SEVEN.items():
        lines += [f"{name:9} {summaries.pop(name)}", f"{'':9} {publication}"]
        lines += [f"{'':11} {what:21} {spec}" for what, spec in variants.items()]
        lines += [*_options(fields(find(name))), ""]
    lines += ["Baselines, and what combines methods", ""]
    for name, summary in summaries.items():
        lines.append(f"{name:9} {summary}")
        if name in own:
            lines += _options(fields(find(name)))
    lines += ["", "Options of every method", *_options(common_options()), "",
              "Exchanges (exchange=NAME), with their options", ""]
    for name, cls in exchanges().items():
        lines += [f"{name:12} {cls.__doc__.strip().splitlines()[0]}", *_options(fields(cls))]
    lines += ["", "What a name alone means"]
    for name in (*SEVEN, "dense"):
        lines += wrap(repr(method(name)).replace(",", ", "), 99, initial_indent=" " * 12,
                      subsequent_indent=" " * 14)
    return "\n".join(lines)


def _options(known):
    """The lines of each option: name=default, what it means, its values."""
    for f in known:
        if f.name != "inner":
            default = {True: "yes", False: "no"}[f.default] if f.type is bool and \
                isinstance(f.default, bool) else f.default
            choices = f.metadata["choices"]
            text = f"{f.name}={default}: {f.metadata['doc']}" + (
                f" ({', '.join(map(str, choices))})" if choices else "")
            yield from wrap(text, 99, initial_indent=" " * 12, subsequent_indent=" " * 14)
