"""What launch/reproduce runs: each paper's claims as lines of runs on data that fits this scale.

A line is one method under one recipe; its learning rate is searched with the grid that its dense
baseline is given, on a validation split, with a seed that is used for nothing else. Lines with
`like` take the rate that another line found: they vary one thing only.
"""

from dataclasses import dataclass

GRID = (0.5, 1.0, 2.0)  # times the recipe's learning rate (launch/trainer/recipes.py)
SEARCH_SEED = 1000


@dataclass(frozen=True)
class Line:
    """One method: its name in tables, and its arguments for launch/train.py."""

    label: str
    method: str
    words: tuple[str, ...] = ()
    like: str = ""  # take the learning rate of the line with this label ...
    times: float = 1.0  # ... times this
    ranks: int = 4
    within: float | None = None  # so many nats a letter above dense are allowed ...
    above: str = ""  # ... or above the line with this label


@dataclass(frozen=True)
class Experiment:
    """One claim: what the paper says, and the lines that show whether it holds here."""

    name: str
    claim: str
    data: str
    lines: tuple[Line, ...]
    words: tuple[str, ...] = ()  # for every line
    seeds: int = 5
    searched: bool = True  # False: every line at its recipe's learning rate
    judged: str = "accuracy"  # or "loss": what table and picture are about


def _ranks(label, method, like, words=()):
    """The same line on 2 and on 8 ranks, with one global batch."""
    return tuple(Line(f"{label}, {n} ranks", method, words, like, ranks=n) for n in (2, 8))


DENSE = Line("dense", "dense")
SHORT = ("--epochs", "4")  # fsdd: half of the recipe's, enough to tell methods apart
BRIEF = ("--epochs", "3")  # mnist5k, likewise
ADAM = ("--optimizer", "adam", "--lr", "0.001")
ADAGRAD = ("--optimizer", "adagrad", "--lr", "0.02")

TERNGRAD = (
    Experiment(
        "terngrad-mnist",
        "MNIST, 2 to 64 workers, fixed total batch of 64: at most 0.22 points lost (section 4.1); "
        "clipping at 2.5 sigma matters on AlexNet (54.63 % top-1 without, 57.61 % with)",
        "mnist5k",
        (DENSE,
         Line("terngrad", "terngrad"),
         Line("terngrad, no clipping", "terngrad:clip=0"),
         Line("terngrad, scaler of the code", "terngrad:scaler=code"),
         *_ranks("dense", "dense", "dense"),
         *_ranks("terngrad", "terngrad", "terngrad"))),
    Experiment(
        "terngrad-fashion",
        "The same on ten thousand test pictures, where a difference of half a point shows",
        "fashion",
        (DENSE,
         Line("terngrad", "terngrad", like="dense"),
         Line("terngrad, no clipping", "terngrad:clip=0", like="dense")),
        words=("--epochs", "1"), seeds=3),
)

ONEBIT = (
    Experiment(
        "onebit-fsdd",
        "Switchboard: no loss with 1-bit and error feedback (16.5 to 16.3 % WER, table 2); without "
        "error feedback training quickly diverges (section 3)",
        "fsdd",
        (DENSE,
         Line("onebit", "onebit"),
         Line("onebit, no error feedback", "onebit:feedback=no"),
         Line("the same at the rate of onebit", "onebit:feedback=no", like="onebit"),
         Line("onebit, two stages (the paper's)", "onebit:exchange=sharded"),
         Line("onebit, two stages, raw own stripe", "onebit:exchange=sharded,own=raw",
              like="onebit, two stages (the paper's)"),
         *_ranks("onebit, two stages", "onebit:exchange=sharded",
                 "onebit, two stages (the paper's)")),
        words=SHORT),
    Experiment(
        "onebit-adagrad",
        "AdaGrad between the two quantisations is best, then before the first (15.8 and 16.1 % WER "
        "against 16.2 on one GPU, table 3)",
        "fsdd",
        (Line("dense, AdaGrad", "dense", ADAGRAD),
         Line("AdaGrad before both", "onebit:exchange=sharded",
              ("--local-adagrad", "--lr", "0.02")),
         Line("AdaGrad between", "onebit:exchange=sharded,adagrad=yes", ("--lr", "0.02")),
         Line("AdaGrad after both", "onebit:exchange=sharded", ADAGRAD)),
        words=SHORT),
)

DOREFA = (
    Experiment(
        "dorefa-bits",
        "Gradients need more bits than activations and weights: 6 lose 0.2 points on ImageNet, 4 "
        "lose 7.4 (the official README)",
        "mnist5k",
        (DENSE, Line("dorefa, 4 bits", "dorefa:bits=4"),
         *(Line(f"dorefa, {k} bit" + "s" * (k > 1), f"dorefa:bits={k}", like="dorefa, 4 bits")
           for k in (1, 2, 6, 8))),
        words=BRIEF),
    Experiment(
        "dorefa-network",
        "The network itself: (W, A, G) = (1, 2, 6) loses 6.5 points on ImageNet against float32, "
        "and (1, 2, 4) another 7.2 (the official README's errors, 40.3, 46.8 and 54.0 %)",
        "mnist5k",
        (Line("32, 32, 32 and dense", "dense", ("--bits", "32,32,32")),
         Line("1, 2, 32 and dense", "dense", ("--bits", "1,2,32")),
         Line("1, 2, 6 and dense", "dense", ("--bits", "1,2,6"), "1, 2, 32 and dense"),
         Line("1, 2, 6 and dorefa, 6 bits", "dorefa:bits=6", ("--bits", "1,2,6"),
              "1, 2, 32 and dense"),
         Line("1, 2, 4 and dorefa, 4 bits", "dorefa:bits=4", ("--bits", "1,2,4"),
              "1, 2, 32 and dense")),
        words=("--model", "dorefa", *BRIEF)),
)

STROM = (
    Experiment(
        "strom-tau",
        "Three orders of magnitude less communication without loss of convergence rate or accuracy "
        "on an acoustic model (abstract)",
        "fsdd",
        (DENSE, *(Line(f"strom, tau {tau}", f"strom:tau={tau}")
                  for tau in (0.003, 0.01, 0.03, 0.1)),
         Line("strom, tau 0.03, peers", "strom:tau=0.03,exchange=peers")),
        words=SHORT),
)

DRYDEN = (
    Experiment(
        "dryden-mnist",
        "Adaptive quantisation keeps the accuracy of MNIST networks (abstract); two stages, "
        "residuals exchanged at each epoch's end (the authors' code)",
        "mnist5k",
        (DENSE,
         Line("dryden 2016", "dryden", like="dense"),
         Line("dryden 2017", "dryden:version=2017", like="dense"),
         Line("dryden 2016, two stages", "dryden:exchange=sharded,own=raw", like="dense"),
         Line("dryden 2016, two stages, epoch flush", "dryden:exchange=sharded,own=raw",
              ("--flush-epochs",), "dense"),
         # what a search on one seed prefers, and at which other seeds diverge
         Line("dryden 2016, twice the rate", "dryden", like="dense", times=2.0),
         Line("onebit", "onebit", like="dense"),
         Line("strom, tau 0.05", "strom:tau=0.05", like="dense")),
        words=BRIEF),
)

DROPPING = (
    Experiment(
        "dropping-mnist",
        "99 % of the gradient dropped without loss on MNIST, most configurations work (abstract): "
        "global or local thresholds, 1-bit survivors",
        "mnist5k",
        (DENSE,
         Line("99 %, global", "dropping"),
         Line("99 %, local", "dropping:scope=layer", like="99 %, global"),
         Line("99 %, global, 1-bit survivors", "dropping:survivors=onebit", like="99 %, global"),
         Line("99 %, global, no residual", "dropping:feedback=no", like="99 %, global"),
         Line("99.9 %, global", "dropping:rate=0.999", like="99 %, global")),
        words=BRIEF),
    Experiment(
        "dropping-server",
        "The paper's own setting: asynchronous, sharded parameter servers with Adam, 99 % of "
        "pushes and of pulls dropped",
        "mnist5k",
        (Line("dense, synchronous, Adam", "dense", ADAM),
         Line("dense, server", "dense:exchange=server", ADAM),
         Line("99 %, server", "dropping:exchange=server", ADAM),
         Line("99 %, synchronous", "dropping", ADAM)),
        words=BRIEF),
    Experiment(
        "dropping-cmudict",
        "Translation (here: spelling to phonemes): no loss of quality with 99 % dropped, where a "
        "global threshold needs layer normalisation (section 4, from memory)",
        "cmudict",
        (DENSE,
         Line("99 %, global", "dropping"),
         Line("99 %, local", "dropping:scope=layer")),
        words=("--steps", "400"), seeds=3, searched=False),
)

ADACOMP = (
    Experiment(
        "adacomp-mnist",
        "MNIST: test error 0.88 % dense, 0.85 % AdaComp; about 40x in convolutions, 200x in fully "
        "connected layers (abstract, table from memory)",
        "mnist5k",
        (DENSE,
         Line("adacomp", "adacomp"),
         Line("adacomp, soft threshold off", "adacomp:factor=1", like="adacomp"),
         *_ranks("adacomp", "adacomp", "adacomp")),
        words=("--log-layers", *BRIEF)),
    Experiment(
        "adacomp-fsdd",
        "Speech (BN50): no degradation at about 200x",
        "fsdd",
        (DENSE, Line("adacomp", "adacomp")), words=("--log-layers", *SHORT)),
    Experiment(
        "adacomp-shakespeare",
        "Character LSTM: test loss 1.73 dense, 1.75 AdaComp, about 200x in recurrent layers",
        "shakespeare",
        (DENSE, Line("adacomp", "adacomp")), words=("--log-layers", "--steps", "250"), seeds=3,
        searched=False),
)

# A transformer on letters, with AdamW (launch/trainer/recipes.py); all rates are searched.
TRANSFORMER = (
    Experiment(
        "transformer",
        "AdamW divides by a running mean of squares, which a residual cannot repair: compressed "
        "gradients lose much, also after a dense start of a fifth of all steps",
        "shakespeare",
        (DENSE,
         Line("onebit", "onebit"),
         Line("onebit, 300 steps dense first", "onebit:warmup=300"),
         Line("dropping", "dropping"),
         Line("dropping, 300 steps dense first", "dropping:warmup=300"),
         Line("block, 8 bits", "block:bits=8", within=0.005),
         Line("block, 4 bits", "block:bits=4", within=0.01)),
        words=("--model", "gpt"), seeds=3, judged="loss"),
)

ONEBITADAM = ("--optimizer", "onebitadam")

ADAM = (
    Experiment(
        "adam",
        "1-bit Adam (arXiv 2102.02888) converges as Adam does, step by step: v is frozen after a "
        "dense start, and the momentum is sent, with error feedback",
        "shakespeare",
        (DENSE,
         Line("onebit", "onebit"),
         Line("OneBitAdam, onebit", "onebit", ONEBITADAM, within=0.02),
         Line("OneBitAdam, onebit, two stages", "onebit:exchange=sharded", ONEBITADAM,
              "OneBitAdam, onebit"),
         Line("OneBitAdam, sign", "sign", ONEBITADAM, "OneBitAdam, onebit", within=0.02),
         Line("OneBitAdam, dropping", "dropping", ONEBITADAM, "OneBitAdam, onebit")),
        words=("--model", "gpt"), seeds=3, judged="loss"),
)


def _local(label, steps, outer, method="dense", **options):
    """Steps alone, then an exchange of differences."""
    return Line(f"{label}, H = {steps}", method, ("--local", str(steps), "--outer", outer),
                **options)


LOCAL = (
    Experiment(
        "local",
        "DiLoCo (arXiv 2311.08105): with AdamW inside and Nesterov outside, an exchange every 50 "
        "to 500 steps costs little. Two lines that it must lie between, on the same letters: "
        "averaging, and one worker alone with a quarter of each batch",
        "shakespeare",
        (DENSE,
         _local("DiLoCo", 10, "nesterov", within=0.05),
         _local("DiLoCo", 50, "nesterov", within=0.12),
         _local("averaging", 10, "average"),
         _local("averaging", 50, "average"),
         _local("DiLoCo", 15, "nesterov"),
         _local("SparseLoCo", 15, "average", "chunks:k=64,block=4096,bits=2,decay=0.95",
                within=0.05, above="DiLoCo, H = 15"),
         Line("one worker alone, 1 rank", "dense", ("--batch", "4"), ranks=1)),
        words=("--model", "gpt"), seeds=3, judged="loss"),
)

# Every system by its name and no other option, but dorefa, which needs 6 bits (its paper's number).
NAMES = ("dense", "terngrad", "onebit", "dorefa:bits=6", "strom", "dryden", "dropping", "adacomp")
DEFAULTS = tuple(
    Experiment(f"defaults-{data}", "Each by its name alone is within a point of dense", data,
               tuple(Line(name, name) for name in NAMES), searched=False)
    for data in ("mnist5k", "fsdd"))

SYSTEMS = {"defaults": DEFAULTS, "terngrad": TERNGRAD, "onebit": ONEBIT, "dorefa": DOREFA,
           "strom": STROM, "dryden": DRYDEN, "dropping": DROPPING, "adacomp": ADACOMP,
           "transformer": TRANSFORMER, "adam": ADAM, "local": LOCAL}
