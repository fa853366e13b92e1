"""The options of launch/train.py."""
from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch

from mpicomp import local_rank
from trainer import models
from trainer.recipes import RECIPES


def three_bits(text):
    """[W, A, G] of "W,A,G"."""
    if not re.fullmatch(r"\d+,\d+,\d+", text):
        raise argparse.ArgumentTypeError(f"expected W,A,G such as 1,2,6, found {text!r}")
    return [int(bits) for bits in text.split(",")]


def take_device(words):
    """(torch.device, None) for --device, or (None, what is wrong). Call it before MPI starts.

    The GPU becomes torch's current one, since MPI may keep the device that it finds when it starts.
    """
    wanted = next((b for a, b in zip(words, words[1:]) if a == "--device"), "cpu")
    wanted = next((w[9:] for w in words if w.startswith("--device=")), wanted)
    if wanted != "cuda":
        return torch.device("cpu"), None
    if not torch.cuda.is_available():
        build = torch.version.cuda
        return None, "--device cuda: torch finds no GPU: " + (
            f"nvidia-smi must list one with a driver for CUDA {build}" if build else
            "this torch is built for CPUs; type  MPICOMP_TORCH=torch==" +
            torch.__version__.split("+")[0] + "  launch/bootstrap  or install a CUDA build of it")
    number = local_rank() % torch.cuda.device_count()  # several ranks may share one
    torch.cuda.set_device(number)
    return torch.device("cuda", number), None


def parse(about, refuse, rank):
    """The parsed command line of train.py, an argparse.Namespace.

    about   train.py's docstring, of which --help shows the first line
    refuse  refuse(line) ends all ranks
    rank    only rank 0 prints the help
    """
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.error = lambda problem: refuse(f"{problem}; --help lists the options")
    if rank:
        parser.print_help = lambda: None
    parser.add_argument("--data", choices=list(RECIPES), default="mnist5k")
    parser.add_argument("--method", default="dense", metavar="SPEC",
                        help="how gradients travel: dense, onebit, terngrad, strom:tau=0.01 ... "
                             "(python -m mpicomp methods lists them)")
    parser.add_argument("--model", choices=list(models.MODELS),
                        help="the data set's own; for pictures dorefa: low-bit weights, "
                             "activations and gradients inside the network, whatever the method "
                             "does between ranks; for shakespeare gpt: a transformer")
    parser.add_argument("--bits", type=three_bits, metavar="W,A,G",
                        help="of --model dorefa, 32 for none (default: 1,2,6)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int, help="passes over the training set")
    length.add_argument("--steps", type=int, help="optimizer steps")
    parser.add_argument("--batch", type=int, help="examples per step, over all ranks together")
    parser.add_argument("--lr", type=float, help="peak learning rate")
    parser.add_argument("--optimizer", choices=["sgd", "adam", "adamw", "adagrad", "onebitadam"])
    parser.add_argument("--momentum", type=float, default=0.0, help="of sgd (default: %(default)s)")
    parser.add_argument("--local-adagrad", action="store_true",
                        help="AdaGrad on each rank's own gradient, before it is exchanged")
    parser.add_argument("--local", type=int, default=0, metavar="H",
                        help="steps that each rank makes alone, before ranks exchange how far they "
                             "have come (docs/local-updates.md); default: none")
    parser.add_argument("--outer", metavar="SPEC",
                        help="with --local, what moves the parameters by the mean of that: average "
                             "(the default), nesterov, heavy-ball:lr=0.7,momentum=0.9")
    parser.add_argument("--flush-epochs", action="store_true",
                        help="exchange all residuals in full at each epoch's end (Dryden 2016)")
    parser.add_argument("--validate", action="store_true",
                        help="train on nine tenths of the training set and score on the tenth: for "
                             "choosing options without a look at the test set")
    parser.add_argument("--log-layers", action="store_true",
                        help="log how many elements of each layer the rank's last packet named")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu",
                        help="cuda: each rank takes a GPU of its node, in turn; more ranks than "
                             "GPUs share them (needs CuPy, see docs/gpu.md)")
    parser.add_argument("--seed", type=int, default=0,
                        help="of initial weights and order of examples")
    parser.add_argument("--nonfinite", choices=["raise", "skip"], default="raise",
                        help="what NaN or Inf in a gradient does to the step "
                             "(default: %(default)s)")
    parser.add_argument("--stall-timeout", type=float, metavar="S",
                        help="where a rank waits S seconds for the others, all say where they are "
                             "and the job ends with status 110 (default: MPICOMP_STALL_TIMEOUT, "
                             "or 600)")
    parser.add_argument("--require-ratio", type=float, metavar="R",
                        help="end with status 2 where R times less than dense is not kept: over "
                             "every 100 steps, warm-up included, and over what remains at the end")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/DATA-METHOD")
    parser.add_argument("--log-every", type=int, default=20, metavar="STEPS")
    parser.add_argument("--save-every", type=int, metavar="STEPS",
                        help="checkpoint interval (default: an epoch, at most 200; 0: at the end)")
    parser.add_argument("--resume", action="store_true",
                        help="go on from the newest checkpoint in --out; start if there is none")
    parser.add_argument("--survive", type=int, nargs="?", const=1, default=0, metavar="RANKS",
                        help="where a rank has died the others do its step again and go on, while "
                             "so many are left (default: 1); needs launch/run --with-ft")
    args = parser.parse_args()
    for name, least in dict(epochs=1, steps=1, batch=1, lr=0, momentum=0, seed=0, log_every=1,
                            save_every=0, survive=0, local=0).items():
        value = getattr(args, name)
        if value is not None and not value >= least:
            refuse(f"--{name.replace('_', '-')} {value}: expected {least} or more")
    if args.survive and args.flush_epochs:
        refuse("--survive with --flush-epochs: a flush cannot be taken back; leave out either")
    if args.outer and not args.local:
        refuse("--outer is for --local H; add that, or leave it out")
    if args.local and args.survive:
        refuse("--survive with --local: mpicomp.Recovery takes LocalUpdates, but this program does "
               "not offer both together; leave out either")
    for name in ("flush_epochs", "log_layers", "require_ratio"):
        if args.local and getattr(args, name):
            refuse(f"--{name.replace('_', '-')} with --local: it is for an exchange in every step; "
                   "leave out either")
    if args.local and args.optimizer == "onebitadam":
        refuse("--optimizer onebitadam with --local: it has momenta exchanged in every step; take "
               "adamw")
    args.outer = args.outer or "average"
    return args
