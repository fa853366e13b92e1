"""Names of parameters without what wrappers put in front of them.

torch.compile calls `fc.weight` `_orig_mod.fc.weight`, DistributedDataParallel and DataParallel call
it `module.fc.weight`. To a Reducer they are one parameter: residuals of a compiled run load into
one that is not, and a rule holds in both.
"""

import re

_COMPILED = re.compile(r"(?<![A-Za-z0-9])_orig_mod\.")  # torch.compile's, at any depth
_PARALLEL = "module."


def bare(name) -> str:
    """The name, or the pattern of a rule, without any wrapper's part."""
    name = _COMPILED.sub("", name)
    while name.startswith(_PARALLEL):
        name = name.removeprefix(_PARALLEL)
    return name


def plain(names) -> list[str]:
    """The names of a model's parameters without the parts of wrappers; as they are if two would
    become one.

    A first `module.` is a wrapper's where all names have it: a model may well have a `module`.
    """
    names = list(names)
    found = [_COMPILED.sub("", name) for name in names]
    while found and all(name.startswith(_PARALLEL) for name in found):
        found = [name.removeprefix(_PARALLEL) for name in found]
    return found if len(set(found)) == len(set(names)) else names


def known_as(names, known) -> list[str]:
    """`names`, or keys such as `error/<name>`; those that only wrappers make another one than a
    known one are called as that.
    """
    now, had = {_key(name): name for name in known}, [_key(name) for name in names]
    if len(now) < len(known) or len(set(had)) < len(had):
        return list(names)
    return [now.get(key, name) for key, name in zip(had, names)]


def _key(text):
    kind, slash, name = text.partition("/")
    return bare(kind) + slash + bare(name)
