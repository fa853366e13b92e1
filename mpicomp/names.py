"""Names of parameters without the prefixes of wrappers.

torch.compile makes `fc.weight` `_orig_mod.fc.weight`, DistributedDataParallel and DataParallel make
it `module.fc.weight`. A Reducer uses the name without prefixes, so residuals that were saved with a
wrapper load without it, and a rule holds for both.
"""

import re

_COMPILED = re.compile(r"(?<![A-Za-z0-9])_orig_mod\.")  # torch.compile's, at any depth
_PARALLEL = "module."


def bare(name) -> str:
    """A name, or a rule's pattern of names, without any wrapper's prefix."""
    name = _COMPILED.sub("", name)
    while name.startswith(_PARALLEL):
        name = name.removeprefix(_PARALLEL)
    return name


def plain(names) -> list[str]:
    """The names of a model's parameters without prefixes; unchanged if two would become equal.

    `module.` counts as a prefix only if all names have it: a model may have a part of that name.
    """
    names = list(names)
    found = [_COMPILED.sub("", name) for name in names]
    while found and all(name.startswith(_PARALLEL) for name in found):
        found = [name.removeprefix(_PARALLEL) for name in found]
    return found if len(set(found)) == len(set(names)) else names


def known_as(names, known) -> list[str]:
    """`names`, or keys such as `error/<name>`, each replaced by the one of `known` that differs
    from it in prefixes only, if there is one.
    """
    now, had = {_key(name): name for name in known}, [_key(name) for name in names]
    if len(now) < len(known) or len(set(had)) < len(had):
        return list(names)
    return [now.get(key, name) for key, name in zip(had, names)]


def _key(text):
    kind, slash, name = text.partition("/")
    return bare(kind) + slash + bare(name)
