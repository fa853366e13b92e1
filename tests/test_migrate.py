"""DeepSpeed's configurations become programs that run, and its checkpoints states of AdamW."""

import ast
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from training import examples, network, replicas_are_identical

from mpicomp import CheckpointError, SpecError, cli
from mpicomp.compat import deepspeed
from mpicomp.compat.deepspeed.checkpoint import variance_updates

# As in DeepSpeed's tutorial on 1-bit Adam, its example for BERT
TUTORIAL = {
    "train_batch_size": 64, "train_micro_batch_size_per_gpu": 4, "steps_per_print": 100,
    "prescale_gradients": False,
    "optimizer": {"type": "OneBitAdam", "params": {
        "lr": 4e-4, "weight_decay": 0.01, "bias_correction": False, "freeze_step": 23000,
        "comm_backend_name": "nccl"}},
    "gradient_clipping": 1.0,
    "fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 16}}


def expression(text):
    """(name, {keyword: value}) of the call that makes the optimizer."""
    made, = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Assign)
             and node.targets[0].id == "optimizer"]
    return ast.unparse(made.func), {k.arg: ast.literal_eval(k.value) for k in made.keywords}


def optimizer_of(kind, **params):
    return deepspeed.translate({"optimizer": {"type": kind, "params": params}})


def notes(text):
    """{key: text} of the notes."""
    said = text.partition("# Notes\n")[2].replace("\n#   ", " ").splitlines()
    return dict(line.removeprefix("# * ").split(": ", 1) for line in said)


# ---- configurations ----


def test_the_tutorials_configuration():
    text = deepspeed.translate(TUTORIAL, ranks=4)
    assert expression(text) == ("mpicomp.optim.OneBitAdam", {
        "lr": 4e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "freeze": 23000})
    assert 'method="onebit")' in text and "accumulation = 4 " in text and "batches of 4" in text
    assert "mpicomp.clip_grad_norm_(optimizer, 1.0)" in text
    assert "torch.autocast(x.device.type, torch.bfloat16)" in text
    assert "mpirun -n 4 python script.py" in text
    said = notes(text)
    assert set(said) == {"optimizer.params.bias_correction", "optimizer.params.comm_backend_name",
                         "freeze_step", "fp16", "gradient_clipping", "steps_per_print",
                         "prescale_gradients"}
    assert "seen 22999 gradients" in said["freeze_step"]
    assert "loss_scale, initial_scale_power" in said["fp16"]
    assert all(len(line) <= 100 for line in text.splitlines())


@pytest.mark.mpi
@pytest.mark.parametrize("kind", ["OneBitAdam", "AdamW"])
@pytest.mark.parametrize("passes", [1, 2])
def test_the_program_trains(comm, kind, passes):
    """As it is printed; 1-bit Adam is frozen after its first step."""
    config = {"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": passes,
              "bf16": {"enabled": True}, "gradient_clipping": 0.5,
              "optimizer": {"type": kind, "params": {"lr": 0.01} | (
                  {"freeze_step": 1} if kind == "OneBitAdam" else {})}}
    model = network(seed=comm.rank)
    data = [examples(comm, step) for step in range(4)]
    names = {"model": model, "loader": data, "loss_fn": torch.nn.functional.cross_entropy}
    exec(compile(deepspeed.translate(config), "program", "exec"), names)
    replicas_are_identical(comm, model)
    assert getattr(names["optimizer"], "frozen", False) == (kind == "OneBitAdam")
    assert names["optimizer"].reducer.step == 4 // passes
    assert names["optimizer"].reducer.method.name == ("onebit" if kind == "OneBitAdam" else "dense")


def test_batches_left_over_begin_the_next_epochs_first_step():
    """Three batches, two a step: two epochs are three steps, as with DeepSpeed's count."""
    config = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2}
    loader = [(torch.ones(1, 1) * n, torch.ones(1, 1)) for n in range(3)]
    text = deepspeed.translate(config)
    head, loop, rest = text.partition("for x, y in loader:")
    assert loop and "\n\n# Start" in rest
    body, _, _ = rest.partition("\n\n# Start")
    names = {"model": torch.nn.Linear(1, 1), "loader": loader,
             "loss_fn": torch.nn.functional.mse_loss}
    exec(compile(head, "program", "exec"), names)
    for steps in (1, 3):  # after each epoch
        exec(compile(loop + body, "loop", "exec"), names)
        assert names["optimizer"].reducer.step == steps


def test_the_program_checks_the_number_of_ranks():
    config = {"train_batch_size": 48, "train_micro_batch_size_per_gpu": 16}
    text = deepspeed.translate(config)
    assert text.index("if 48 % (16 * optimizer") < text.index("accumulation = 48 // (16 *")
    check = text[text.index("if 48 %"):text.index("accumulation =")]
    for ranks, right in ((1, True), (3, True), (2, False), (6, False)):
        names = {"optimizer": SimpleNamespace(reducer=SimpleNamespace(
            comm=SimpleNamespace(size=ranks)))}
        if right:
            exec(check, names)
        else:
            with pytest.raises(SystemExit, match="another number"):
                exec(check, names)
    for config in ({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 16},
                   {"train_batch_size": 10, "train_micro_batch_size_per_gpu": 4,
                    "gradient_accumulation_steps": 2}):
        with pytest.raises(SpecError, match=f"train_batch_size={config['train_batch_size']} found"):
            deepspeed.translate(config)


@pytest.mark.parametrize("kind, key, freeze", [
    ("OneBitAdam", {}, "auto"), ("onebitadam", {"freeze_step": 400}, 400),
    ("ZeroOneAdam", {"var_freeze_step": 12500}, 12500), ("ZeroOneAdam", {}, "auto"),
    ("OneBitLamb", {"freeze_step": 1000}, "auto")])
def test_their_1_bit_optimizers(kind, key, freeze):
    text = optimizer_of(kind, lr=1e-3, betas=[0.8, 0.99], eps=1e-6, **key)
    assert expression(text) == ("mpicomp.optim.OneBitAdam", {
        "lr": 1e-3, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.0, "freeze": freeze})
    said = notes(text)
    assert ("100,000 in DeepSpeed" in str(said)) == (not key)
    assert ("SEARCH THE LEARNING RATE AGAIN" in str(said)) == (kind == "OneBitLamb")
    assert ("LocalUpdates" in str(said)) == (kind == "ZeroOneAdam")


def test_other_optimizers():
    assert expression(optimizer_of("Adam", lr=0.1))[0] == "torch.optim.AdamW"
    assert expression(deepspeed.translate({})) == ("torch.optim.AdamW", {"lr": 0.001})
    said = notes(optimizer_of("Lion", lr=0.1))
    assert said["optimizer"].startswith("Lion found: make your own")


def test_what_is_not_translated_is_named():
    config = {"zero_optimization": {"stage": 2}, "my_key": 1, "fp16": {"enabled": "auto"},
              "scheduler": {"type": "WarmupLR"}, "communication_data_type": "fp16",
              "optimizer": {"type": "AdamW", "mine": 2, "params": {"lr": "auto", "fast": 1}}}
    text = deepspeed.translate(config)
    said = notes(text)
    assert expression(text)[1]["lr"] == 0.001 and 'method="fp16"' in text
    assert said["my_key"] == said["optimizer.mine"] == said["optimizer.params.fast"] == (
        "UNKNOWN, not translated")
    assert "has no ZeRO" in said["zero_optimization"] and "itself refuses" in str(said)
    assert said["lr"].startswith('is "auto"') and said["enabled"].startswith('is "auto"')
    assert "torch.optim.lr_scheduler" in said["scheduler"]
    assert notes(deepspeed.translate({"zero_optimization": {"stage": 0}, "bf16": {}})) == {
        "optimizer": said_of_none()}


def said_of_none():
    return "none found: make your own, as below; mpicomp takes any optimizer of torch"


@pytest.mark.parametrize("total, micro, passes, ranks, expected", [
    (4096, 16, None, 64, "accumulation = 4 "), (4096, 16, 4, 64, "accumulation = 4 "),
    (4096, None, 4, 64, "batches of 16"), (64, None, None, 4, "batches of 16"),
    (None, 16, 4, None, "accumulation = 4 "), (4096, 16, 4, None, "start 64"),
    (4096, 16, None, None, "accumulation = 4096 // (16 * optimizer.reducer.comm.size)")])
def test_batches(total, micro, passes, ranks, expected):
    config = {"train_batch_size": total, "train_micro_batch_size_per_gpu": micro,
              "gradient_accumulation_steps": passes}
    text = deepspeed.translate({k: v for k, v in config.items() if v}, ranks)
    assert expected in text
    compile(text, "program", "exec")


@pytest.mark.parametrize("config, text", [
    ([], "a list found"), ({"optimizer": "Adam"}, "optimizer='Adam' found"),
    ({"train_batch_size": 10, "train_micro_batch_size_per_gpu": 4}, "a multiple of 8"),
    ({"gradient_clipping": "1"}, "gradient_clipping='1' found, expected a number, at least 0"),
    ({"gradient_accumulation_steps": 0.5}, "expected a whole number, at least 1"),
    ({"optimizer": {"type": "Adam", "params": {"betas": 0.9}}}, "betas=0.9"),
    ({"optimizer": {"type": "Adam", "params": {"betas": "ab"}}}, "betas='ab'"),
    ({"optimizer": {"type": "Adam", "params": {"betas": ["x", None]}}}, "expected two numbers"),
    ({"gradient_clipping": float("nan")}, "gradient_clipping=nan found"),
    ({"communication_data_type": "int8"}, "expected fp16, fp32 or bfp16")])
def test_bad_configurations(config, text):
    with pytest.raises(SpecError, match=text.replace("(", r"\(")):
        deepspeed.translate(config, ranks=2)


# ---- checkpoints ----

# The optimizers' formulas before the freeze, as modern descriptions of DeepSpeed's code have them:
# no bias correction, and a first step that changes nothing but counts.
BETAS, STEPS = (0.9, 0.999), 7


def gradients():
    """Of STEPS steps: [tensors, in the order of the model's parameters]."""
    generator = torch.Generator().manual_seed(3)
    return [[torch.randn(p.shape, generator=generator) for p in network().parameters()]
            for _ in range(STEPS)]


def theirs(flat, kind="OneBitAdam", groups=1, **more):
    """A checkpoint in DeepSpeed's layout: `flat` as of fp16, else a state for each parameter."""
    model = network()
    own = list(model.parameters())
    members = [[i for i, p in enumerate(own) if groups == 1 or (p.dim() > 1) == (g == 0)]
               for g in range(groups)]
    moments = [[torch.zeros_like(p), torch.zeros_like(p)] for p in own]
    for step in gradients():
        for (m, v), g in zip(moments, step):
            m.mul_(BETAS[0]).add_(g, alpha=1 - BETAS[0])
            v.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
    options = {"lr": 4e-4, "betas": BETAS, "eps": 1e-8, "weight_decay": 0.01,
               "bias_correction": True, "max_grad_norm": 0.0}

    def entry(m, v):
        return {"step": STEPS + 1, "exp_avg": m.clone(), "exp_avg_sq": v.clone(),
                "worker_error": torch.zeros(16), "server_error": torch.zeros(8),
                "tensor_size": m.numel(), "corrected_tensor_size": 16, "server_chunk_size": 8}

    def joined(tensors):
        return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])

    if flat:
        inner = {"state": {g: entry(*(joined(moments[i][k] for i in ids) for k in (0, 1)))
                           for g, ids in enumerate(members)},
                 "param_groups": [{**options, "params": [g]} for g in range(groups)]}
        optimizer = {"dynamic_loss_scale": True, "cur_scale": 65536.0, "cur_iter": STEPS,
                     "optimizer_state_dict": inner, "clip_grad": 1.0,
                     "fp32_groups_flat": [joined(own[i] for i in ids) for ids in members]}
    else:
        order = [i for ids in members for i in ids]
        bounds = np.cumsum([0, *map(len, members)]).tolist()
        optimizer = {"state": {n: entry(*moments[i]) for n, i in enumerate(order)},
                     "param_groups": [{**options, "params": list(range(a, b))}
                                      for a, b in zip(bounds, bounds[1:])]}
    module = model.half().state_dict() if flat else model.state_dict()
    module["running"] = torch.ones(2)
    return {"module": module, "buffer_names": ["running"], "optimizer": optimizer,
            "param_shapes": None, "lr_scheduler": None, "global_steps": STEPS, "skipped_steps": 0,
            "dp_world_size": 4, "mp_world_size": 1, "ds_version": "0.17.5",
            "ds_config": {"optimizer": {"type": kind, "params": {"freeze_step": 100}}}, **more}


PATTERNS = [["*weight"], ["*bias"]]


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_checkpoint_goes_on_as_adamw_would(flat, groups):
    """Moments, and the next step, are those of torch's AdamW that has seen the same gradients."""
    found, said = deepspeed.adamw_state(theirs(flat, groups=groups),
                                        PATTERNS if groups == 2 else None)
    assert said[0] == "written by DeepSpeed 0.17.5 on 4 ranks after 7 steps"
    assert said[1:] == [
        "step 8 of OneBitAdam becomes 7: the gradients that its variance has seen"]

    def fresh():
        model = network()
        parameters = list(model.parameters())
        own = [[p for p in parameters if groups == 1 or (p.dim() > 1) == (g == 0)]
               for g in range(groups)]
        return model, torch.optim.AdamW([{"params": group} for group in own], lr=4e-4,
                                        weight_decay=0.01)

    def give(model, step):
        for p, g in zip(model.parameters(), step):
            p.grad = g.clone()

    model, expected = fresh()
    for step in gradients():
        give(model, step)
        expected.step()
    other, optimizer = fresh()
    optimizer.load_state_dict(found["optimizer"])
    for p, q in zip(other.parameters(), model.parameters()):
        for key in ("exp_avg", "exp_avg_sq", "step"):
            torch.testing.assert_close(optimizer.state[p][key], expected.state[q][key])
    with torch.no_grad():
        for p, q in zip(other.parameters(), model.parameters()):
            p.copy_(q)
    for one, two in ((model, expected), (other, optimizer)):
        give(one, gradients()[0])
        two.step()
    for p, q in zip(other.parameters(), model.parameters()):
        torch.testing.assert_close(p, q)


def test_weights_are_the_float32_ones_and_buffers_stay():
    found, _ = deepspeed.adamw_state(theirs(True))
    for name, p in network().named_parameters():
        assert torch.equal(found["model"][name], p) and found["model"][name].dtype == torch.float32
    assert found["model"]["running"].tolist() == [1, 1]
    assert set(found["optimizer"]["state"]) == {name for name, _ in network().named_parameters()}


def test_frozen_parameters_are_in_no_group():
    checkpoint = theirs(False)
    checkpoint["module"] = {"frozen": torch.ones(4), **checkpoint["module"]}
    with pytest.raises(CheckpointError, match="6 parameters with a state found .*, expected 7"):
        deepspeed.adamw_state(checkpoint)
    found, said = deepspeed.adamw_state(checkpoint, [["[0-9]*"]])
    assert "frozen" not in found["optimizer"]["state"] and found["model"]["frozen"][0] == 1
    assert said[1] == "frozen is in no group, so it is taken for frozen"


def test_shared_parameters_are_counted_once():
    table = torch.nn.Parameter(torch.arange(6.0).view(3, 2))
    state = {0: {"step": 3, "exp_avg": torch.ones(3, 2), "exp_avg_sq": torch.ones(3, 2)}}
    group = {"params": [0], "lr": 1e-3, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.0}
    found, _ = deepspeed.adamw_state({
        "module": {"words": table, "head": table},
        "optimizer": {"state": state, "param_groups": [group]}})
    assert list(found["optimizer"]["state"]) == ["words"]
    assert found["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.99)


@pytest.mark.parametrize("key", ["fp32_groups_flat", "fp32_groups"])
def test_tied_weights_are_the_float32_ones_under_both_names(key):
    """What load_state_dict reads last would else be the 16-bit one."""
    table = torch.arange(6.0).view(3, 2) / 3
    half = table.half()
    whole = key == "fp32_groups"
    moments = torch.ones(3, 2) if whole else torch.ones(6)
    group = {"params": [0], "lr": 1e-3, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.0}
    found, _ = deepspeed.adamw_state({
        "module": {"words": half, "bias": torch.ones(2), "head": half, "wide": half[:1]},
        "buffer_names": ["bias", "wide"],
        "optimizer": {key: [[table]] if whole else [table.reshape(-1)], "optimizer_state_dict": {
            "state": {0: {"step": 5, "exp_avg": moments, "exp_avg_sq": moments}},
            "param_groups": [group]}}})
    assert torch.equal(found["model"]["words"], table) and torch.equal(found["model"]["head"],
                                                                      table)
    assert list(found["optimizer"]["state"]) == ["words"]
    assert found["model"]["wide"].dtype == torch.float16


@pytest.mark.parametrize("params, text", [
    ({"freeze_step": "auto"}, "freeze_step='auto' found, expected a whole number"),
    ({"freeze_step": None}, "freeze_step=None found")])
def test_a_freeze_that_the_file_does_not_tell(params, text):
    checkpoint = theirs(True, ds_config={"optimizer": {"type": "OneBitAdam", "params": params}})
    with pytest.raises(CheckpointError, match=text):
        deepspeed.adamw_state(checkpoint)


@pytest.mark.parametrize("kind, params, step, seen", [
    ("OneBitAdam", {"freeze_step": 100}, 101, 99),  # the variance is frozen after step 100
    ("OneBitAdam", {"freeze_step": 100}, 5000, 99), ("OneBitAdam", {}, 101, 100),
    ("OneBitLamb", {"freeze_step": 100}, 300, 99),
    ("ZeroOneAdam", {"var_freeze_step": 12499}, 118000, 153), ("ZeroOneAdam", {}, 1000, 96),
    ("AdamW", {}, 101, 101)])
def test_steps_become_what_the_variance_has_seen(kind, params, step, seen):
    checkpoint = theirs(True, ds_config={"optimizer": {"type": kind, "params": params}})
    checkpoint["optimizer"]["optimizer_state_dict"]["state"][0]["step"] = step
    found, said = deepspeed.adamw_state(checkpoint)
    assert {float(state["step"]) for state in found["optimizer"]["state"].values()} == {seen}
    assert f"step {step}" in said[-1]


def test_when_zero_one_adam_updates_its_variance():
    """Worked numbers: with scaler 2 at 2 3 4 6 8 12 16 24 32 48 64; 16: 96 and 153 updates."""
    counts = [variance_updates(step, 2) for step in range(1, 65)]
    assert [step for step in range(2, 65) if counts[step - 1] > counts[step - 2]] == [
        2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    assert [variance_updates(step) for step in (1, 1000, 12500)] == [0, 96, 153]


def broken(change):
    checkpoint = theirs(True)
    change(checkpoint)
    return checkpoint


@pytest.mark.parametrize("checkpoint, text", [
    (lambda: {"model": 1}, "expected the keys module and optimizer"),
    (lambda: broken(lambda c: c.update(optimizer=None)), "with ZeRO it lies in other files"),
    (lambda: broken(lambda c: c.update(mp_world_size=2)), "mp_world_size=2"),
    (lambda: broken(lambda c: c.update(buffer_names=[])), "of 1183 elements found, expected 1185"),
    (lambda: broken(lambda c: c["optimizer"]["optimizer_state_dict"]["state"][0].pop("exp_avg")),
     "state 0 has no exp_avg"),
    (lambda: broken(lambda c: c["optimizer"].pop("optimizer_state_dict")), "no state and param"),
    (lambda: theirs(True, groups=2), "--groups GROUPS.json"),
    (lambda: broken(lambda c: c["optimizer"]["fp32_groups_flat"].append(torch.ones(1))),
     "2 flat groups found, expected 1")], ids=range(8))
def test_checkpoints_that_cannot_be_read(checkpoint, text):
    with pytest.raises(CheckpointError, match=text):
        deepspeed.adamw_state(checkpoint())


def test_groups_that_do_not_fit():
    with pytest.raises(CheckpointError, match="3 groups given, expected 2"):
        deepspeed.adamw_state(theirs(False, groups=2), [["*"], [], []])
    with pytest.raises(CheckpointError, match="3 parameters with a state found .*, expected 1"):
        deepspeed.adamw_state(theirs(False, groups=2), [["*weight"], ["4*"]])
    with pytest.raises(CheckpointError, match="3 parameters with a state found .*, expected 6"):
        deepspeed.adamw_state(theirs(False, groups=2), [["*"], ["4*"]])
    with pytest.raises(CheckpointError, match="exp_avg of shape .* found for"):
        deepspeed.adamw_state(theirs(False, groups=2), [["*bias"], ["*weight"]])


# ---- the command ----


def test_the_command_prints_a_program(tmp_path, capsys):
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(TUTORIAL))
    assert cli.main(["migrate", str(path), "--ranks", "4"]) == 0
    assert capsys.readouterr().out == deepspeed.translate(TUTORIAL, ranks=4)


def test_the_command_converts_a_checkpoint(tmp_path, capsys):
    path, out, groups = (tmp_path / name for name in ("states.pt", "adamw.pt", "groups.json"))
    torch.save(theirs(True, groups=2), path)
    groups.write_text(json.dumps(PATTERNS))
    words = ["migrate", "--checkpoint", str(path), "-o", str(out), "--groups", str(groups)]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    expected, _ = deepspeed.adamw_state(theirs(True, groups=2), PATTERNS)
    model, optimizer = network(), None
    model.register_buffer("running", torch.zeros(2))
    own = list(model.parameters())
    optimizer = torch.optim.AdamW([{"params": own[0::2]}, {"params": own[1::2]}])
    exec(printed, {"torch": torch, "model": model, "optimizer": optimizer})
    assert torch.equal(optimizer.state[own[1]]["exp_avg"],
                       expected["optimizer"]["state"]["1.bias"]["exp_avg"])
    assert cli.main(words) == 2 and "is there already" in capsys.readouterr().err


@pytest.mark.parametrize("words, text", [
    ([], "nothing to do"), (["no.json"], "no.json: No such file"), (["states.pt"], "is no JSON"),
    (["--checkpoint", "no.pt"], "no.pt: No such file"),
    (["--checkpoint", "states.pt"], "cannot be read with weights_only=True"),
    (["--checkpoint", "junk.pt"], "cannot be read with weights_only=True"),
    (["--checkpoint", "good.pt", "-o", "no/adamw.pt"], "the folder no is not there"),
    (["--checkpoint", "good.pt", "--groups", "groups.json"], "expected a list of lists")])
def test_files_that_cannot_be_read(tmp_path, capsys, monkeypatch, words, text):
    monkeypatch.chdir(tmp_path)
    torch.save({"module": {}, "client_state": SimpleNamespace()}, "states.pt")
    torch.save(theirs(True), "good.pt")
    (tmp_path / "junk.pt").write_bytes(b"\x80\x02}q\x00.junk")
    (tmp_path / "groups.json").write_text('["*"]')
    assert cli.main(["migrate", *words]) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "adamw.pt").exists()
