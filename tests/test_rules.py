"""What holds for every rule beside mutual matching: backends agree, calls have one form, torch takes the operators.

MG_OPS_FUZZ scales the number of random cases. A failure names its seed, of which
`rule_batches.random_rule_arguments(rule, seed)` makes the arguments again.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import pickle
from typing import Any

import cuda_on_cpu
import numpy as np
import pytest
import torch
from conftest import Target, fuzz_cases
from cuda_on_cpu import rules as emulated
from detector_batches import WORST, detector_batch, worst_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from object_forms import FORMS, in_form, without_labels
from operators import operator_arguments
from random_batches import to_device
from rule_batches import RULES, RuleMatch, arguments_of, assert_same_match, random_rule_arguments
from small_batches import small_batches

import mg_ops
from mg_ops.matcher import Batch, Call
from mg_ops.rules import operators

WITHOUT_TRITON = True
READ_NO_LABELS = ("max_iou_match", "atss_match")
pytestmark = pytest.mark.parametrize("rule", RULES)
SMALL_BLOCKS = {"threads": 32, "list_room": 8}


@pytest.fixture(scope="module")
def small_blocks() -> emulated.RuleEmulator:
    return emulated.build(**SMALL_BLOCKS)


@pytest.fixture(scope="module", params=[{"threads": 64}, SMALL_BLOCKS], ids=["64 threads", "32 threads, tiny lists"])
def emulator(request: pytest.FixtureRequest) -> emulated.RuleEmulator:
    return emulated.build(**request.param)


def call(rule: str, arguments: dict[str, Any], target: Target) -> RuleMatch:
    return RULES[rule].function(**to_device(arguments, target.device), backend=target.backend)


def reference(rule: str, arguments: dict[str, Any]) -> RuleMatch:
    return RULES[rule].function(**arguments, backend="eager")


def usual_arguments(rule: str, num_images: int = 2, num_anchors: int = 200, num_objects: int = 5) -> dict[str, Any]:
    return arguments_of(rule, detector_batch(num_images, num_anchors, num_objects))


def take_options(rule: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Takes those that the matcher is made with out of the arguments of a call."""
    names = {field.name for field in dataclasses.fields(RULES[rule].matcher)}
    return {name: arguments.pop(name) for name in names & arguments.keys()}


# ---------------------------------------------------------------------------------------------------------------------
# Backends equal the reference


@pytest.mark.parametrize("part", range(4))
def test_random_batches(rule: str, compiled_target: Target, part: int) -> None:
    count = fuzz_cases(70)
    for seed in range(part * count, (part + 1) * count):
        arguments = random_rule_arguments(rule, seed)
        assert_same_match(call(rule, arguments, compiled_target), reference(rule, arguments), f"seed {seed}")


@pytest.mark.slow
def test_large_random_batches(rule: str, compiled_target: Target) -> None:
    for seed in range(fuzz_cases(6)):
        arguments = random_rule_arguments(rule, seed, large=True)
        assert_same_match(call(rule, arguments, compiled_target), reference(rule, arguments), f"seed {seed}, large")


@settings(max_examples=fuzz_cases(300))
@given(arguments=small_batches(), seed=st.integers(0, 2**32))
def test_small_batches(rule: str, compiled_target: Target, arguments: dict[str, Any], seed: int) -> None:
    random = np.random.default_rng(seed)
    arguments = arguments_of(rule, arguments, random) | RULES[rule].random_options(random)
    assert_same_match(call(rule, arguments, compiled_target), reference(rule, arguments), arguments)


def test_random_batches_match_something(rule: str) -> None:
    """The random arguments are worth their time: many have positives."""
    matches = [reference(rule, random_rule_arguments(rule, seed)) for seed in range(60)]
    assert sum(bool((match.cls_match >= 0).any()) for match in matches) > 12


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("sizes", [(1, 6000, 40), (3, 2000, 7), (13, 1500, 5), (2, 9000, 0), (1, 500, 300)])
def test_thread_count_does_not_matter(
    rule: str, compiled_target: Target, threads: int, sizes: tuple[int, int, int]
) -> None:
    """Fewer images than threads, and more."""
    arguments = usual_arguments(rule, *sizes)
    expected, before = reference(rule, arguments), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(3):
            assert_same_match(call(rule, arguments, compiled_target), expected, f"{threads} threads")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", WORST)
def test_worst_cases(rule: str, compiled_target: Target, kind: str) -> None:
    """When thousands of anchors compete for one object, and when all of them tie."""
    arguments = arguments_of(rule, worst_batch(kind, 3000))
    for seed in range(5):
        options = RULES[rule].random_options(np.random.default_rng(seed))
        expected = reference(rule, arguments | options)
        assert_same_match(call(rule, arguments | options, compiled_target), expected, f"{kind}, {options}")


# ---------------------------------------------------------------------------------------------------------------------
# The CUDA kernels, thread by thread on the CPU


def test_random_batches_by_the_cuda_kernels(rule: str, emulator: emulated.RuleEmulator) -> None:
    for seed in range(fuzz_cases(20)):
        arguments = random_rule_arguments(rule, seed)
        match = emulator.run(rule, RULES[rule].function, **arguments, seed=seed)
        assert_same_match(match, reference(rule, arguments), f"seed {seed}")


def test_blocks_as_on_a_gpu(rule: str) -> None:
    emulator = emulated.build()
    for seed in range(5000, 5000 + fuzz_cases(5)):
        arguments = random_rule_arguments(rule, seed)
        match = emulator.run(rule, RULES[rule].function, **arguments, seed=seed)
        assert_same_match(match, reference(rule, arguments), f"seed {seed}")


@settings(max_examples=fuzz_cases(100))
@given(arguments=small_batches(), seed=st.integers(0, 2**32))
def test_small_batches_by_the_cuda_kernels(
    rule: str, small_blocks: emulated.RuleEmulator, arguments: dict[str, Any], seed: int
) -> None:
    random = np.random.default_rng(seed)
    arguments = arguments_of(rule, arguments, random) | RULES[rule].random_options(random)
    match = small_blocks.run(rule, RULES[rule].function, **arguments, seed=seed)
    assert_same_match(match, reference(rule, arguments), arguments)


@pytest.mark.parametrize("kind", WORST)
def test_worst_cases_by_the_cuda_kernels(rule: str, emulator: emulated.RuleEmulator, kind: str) -> None:
    arguments = arguments_of(rule, worst_batch(kind, 500))
    for seed in range(3):
        options = RULES[rule].random_options(np.random.default_rng(seed))
        match = emulator.run(rule, RULES[rule].function, **arguments, **options, seed=seed)
        assert_same_match(match, reference(rule, arguments | options), f"{kind}, {options}")


def test_many_objects_by_the_cuda_kernels(rule: str, small_blocks: emulated.RuleEmulator) -> None:
    arguments = usual_arguments(rule, 2, 150, 80)
    for seed in range(3):
        match = small_blocks.run(rule, RULES[rule].function, **arguments, seed=seed)
        assert_same_match(match, reference(rule, arguments), f"seed {seed}")


def test_wrong_offsets_are_read_as_the_reference_does(rule: str, small_blocks: emulated.RuleEmulator) -> None:
    """CPU tensors with such offsets raise; on a GPU nothing may be read or written out of bounds."""
    for seed in range(fuzz_cases(25)):
        arguments = list(operator_arguments(function=RULES[rule].function, **random_rule_arguments(rule, seed)))
        arguments[5] = cuda_on_cpu.wrong_offsets(seed, arguments[2].shape[0], len(arguments[3]))
        match = small_blocks.operator(rule, *arguments, seed=seed)
        expected = operators.RULES[rule].definition(*arguments)
        for value, wanted in zip(match, expected, strict=True):
            assert torch.equal(value, wanted), f"seed {seed}, offsets {arguments[5].tolist()}"


def test_scratch_of_the_cuda_kernels(rule: str, small_blocks: emulated.RuleEmulator) -> None:
    """Within 40 bytes an image and anchor, and little for an object."""
    for sizes in [(3, 200, 5), (1, 40, 300), (2, 0, 3), (0, 50, 0), (2, 100, 0)]:
        arguments = usual_arguments(rule, *sizes)
        small_blocks.run(rule, RULES[rule].function, **arguments)
        num_pairs, num_objects = sizes[0] * sizes[1], sizes[0] * sizes[2]
        assert small_blocks.last_call.scratch_bytes <= 32 * num_pairs + 400 * num_objects + 4 * sizes[0] + 1000


# ---------------------------------------------------------------------------------------------------------------------
# One calling convention


def test_every_option_of_the_matcher_is_one_of_the_function(rule: str) -> None:
    """With its default."""
    function = inspect.signature(RULES[rule].function).parameters
    own = {name for name, value in function.items() if value.kind is value.KEYWORD_ONLY}
    fields = {field.name: field.default for field in dataclasses.fields(RULES[rule].matcher)}
    assert fields.keys() == own | (Call.__annotations__.keys() - Batch.__annotations__.keys())
    assert {name: fields[name] for name in own} == {name: function[name].default for name in own}


def test_an_argument_that_is_none_is_refused_by_name(rule: str) -> None:
    arguments = usual_arguments(rule) | {"pred_boxes": None, "box_deltas": None, "box_coder": None}
    options = take_options(rule, arguments)
    for call in (functools.partial(RULES[rule].function, **options), RULES[rule].matcher(**options)):
        with pytest.raises(TypeError, match=rf"^{rule}\(\) got an unexpected keyword argument 'sores'$"):
            call(**arguments | {"sores": 1})
    with pytest.raises(TypeError, match=rf"^check: expected it where .*{RULES[rule].matcher.__name__}\(check=\.\.\.\)"):
        RULES[rule].matcher()(**arguments | {"check": True})


def test_the_matcher_gives_what_the_function_gives(rule: str, target: Target) -> None:
    for seed in range(fuzz_cases(10)):
        arguments = to_device(random_rule_arguments(rule, seed), target.device) | {"backend": target.backend}
        expected = RULES[rule].function(**arguments)
        options = take_options(rule, arguments)
        assert_same_match(RULES[rule].matcher(**options)(**arguments), expected, f"seed {seed}")


def test_the_matcher_is_a_value(rule: str) -> None:
    matcher = RULES[rule].matcher(check=True)
    assert pickle.loads(pickle.dumps(matcher)) == copy.deepcopy(matcher) == matcher != RULES[rule].matcher()
    assert hash(dataclasses.replace(matcher)) == hash(matcher)
    with pytest.raises(dataclasses.FrozenInstanceError):
        matcher.check = False
    for options in ({"gt_box_format": "yxyx"}, {"backend": "tpu"}, {"check": 1}, {"box_coder": (1.0, 1.0)}):
        with pytest.raises((TypeError, ValueError), match=f"^{next(iter(options))}: expected"):
            RULES[rule].matcher(**options)


def test_it_takes_a_mutual_matchers_place(rule: str, target: Target) -> None:
    """Changing the rule is changing the line that makes the matcher: the call, the targets and the summary stay."""
    arguments = to_device(usual_arguments(rule), target.device)
    options = take_options(rule, arguments) | {"backend": target.backend}
    coder = options["box_coder"]
    objects = {name: arguments[name] for name in ("gt_boxes", "gt_labels")}
    of_mutual = mg_ops.MutualMatcher(box_coder=coder, backend=target.backend)
    for matcher in (of_mutual, RULES[rule].matcher(**options)):
        match = matcher(**arguments)
        targets = mg_ops.encode_targets(match, arguments["anchors"], **objects, box_coder=coder)
        assert torch.equal(targets.loc_labels >= 0, match.loc_positive)
        summary = mg_ops.summarize(match, arguments["gt_boxes"])
        assert int(summary.cls_positives[0]) == int(match.cls_positive.sum()) > 0


@pytest.mark.parametrize("form", FORMS)
def test_objects_come_in_every_form(rule: str, target: Target, form: str) -> None:
    arguments = to_device(usual_arguments(rule), target.device) | {"backend": target.backend}
    expected = RULES[rule].function(**arguments)
    boxes, labels = arguments.pop("gt_boxes"), arguments.pop("gt_labels")
    objects, is_object = in_form(form, boxes, labels)
    match = RULES[rule].function(**arguments, **objects)
    if is_object is None:
        assert_same_match(match, expected, form)
    else:
        positions = [row.nonzero().flatten() for row in is_object]
        for image, places in enumerate(positions):
            of_image = expected.cls_match[image]
            assert torch.equal(
                match.cls_match[image], torch.where(of_image >= 0, places[of_image.clamp(min=0)], of_image)
            )
        assert torch.equal(match.num_pos[is_object], expected.num_pos)
        assert int(match.num_pos[~is_object].sum()) == 0
    if form == "padded, labels tell":
        return
    bare = arguments | without_labels(objects)
    if rule in READ_NO_LABELS:
        assert_same_match(RULES[rule].function(**bare), match, form)
    else:
        missing = rf"^gt_labels: {rule}.* reads the labels|^gt_boxes\[0\]: expected a dictionary with .* and \"labels\""
        with pytest.raises((TypeError, ValueError), match=missing):
            RULES[rule].function(**bare)


def test_levels_are_joined(rule: str, target: Target) -> None:
    arguments = to_device(usual_arguments(rule), target.device) | {"backend": target.backend}
    expected = RULES[rule].function(**arguments)
    for name in ("anchors", "box_deltas", "cls_logits"):
        arguments[name] = arguments[name].split(60, dim=-2)
    assert_same_match(RULES[rule].function(**arguments), expected)


def test_the_counts_are_those_of_the_match(rule: str, target: Target) -> None:
    arguments = to_device(usual_arguments(rule), target.device)
    match = RULES[rule].function(**arguments, backend=target.backend)
    for image, counts in enumerate(match.num_pos.split(5)):
        assert counts.tolist() == [int((match.cls_match[image] == index).sum()) for index in range(5)]
    assert match.num_pos.sum() > 0
    if RULES[rule].two_matches:
        for image, counts in enumerate(match.num_loc_pos.split(5)):
            assert counts.tolist() == [int((match.loc_match[image] == index).sum()) for index in range(5)]
        assert match.num_loc_pos.sum() > 0
    else:
        assert torch.equal(match.loc_match, torch.where(match.cls_match >= 0, match.cls_match, -1))
    assert torch.equal(match.ignored, match.cls_match == mg_ops.IGNORED)


# ---------------------------------------------------------------------------------------------------------------------
# Wrong calls


def test_wrong_calls_name_what_is_wrong(rule: str, target: Target) -> None:
    arguments = to_device(usual_arguments(rule), target.device) | {"backend": target.backend}
    for changed, error, message in [
        ({"anchors": arguments["anchors"][:, :3]}, ValueError, r"^anchors: expected shape \(A, 4\)"),
        ({"gt_boxes": arguments["gt_boxes"][:1]}, ValueError, "^gt_boxes: expected a list of 2 tensors"),
        ({"cls_logits": arguments["cls_logits"][:1]}, ValueError, "^box_deltas: expected shape"),
        ({"box_coder": None}, ValueError, "^box_coder: expected one with box_deltas"),
        (
            {"pred_boxes": arguments["box_deltas"]},
            ValueError,
            "^box_deltas: expected pred_boxes or",
        ),
        ({"gt_box_format": "yxyx"}, ValueError, "^gt_box_format: expected one of"),
        ({"check": 1}, TypeError, "^check: expected True or False"),
        ({"backend": "tpu"}, ValueError, "^backend: expected None or one of"),
        ({"gt_offsets": torch.tensor([0, 5, 10])}, ValueError, "^gt_offsets: only packed gt_boxes"),
    ]:
        with pytest.raises(error, match=message):
            RULES[rule].function(**arguments | changed)
    nan = [boxes.clone() for boxes in arguments["gt_boxes"]]
    nan[1][2, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^gt_boxes: image 1, object 2: expected four"):
        RULES[rule].function(**arguments | {"gt_boxes": nan, "check": True})


def test_there_is_no_triton_kernel(rule: str) -> None:
    with pytest.raises(RuntimeError, match=r"^backend 'triton' cannot be used: "):
        RULES[rule].function(**usual_arguments(rule), backend="triton")


def test_the_operator_checks_its_arguments(rule: str, target: Target) -> None:
    """It can be called by itself, and wrong input must never crash the process."""
    operator = operator_of(rule, target)
    arguments = operator_arguments(function=RULES[rule].function, **to_device(usual_arguments(rule), target.device))
    for place, value in [
        (0, arguments[0][:, :3]),
        (1, arguments[1][:, 1:]),
        (2, arguments[2].long()),
        (3, arguments[3][1:]),
        (4, arguments[4].float()),
        (5, arguments[5][1:]),
        (6, torch.zeros(3, dtype=torch.bool, device=target.device)),
        (7, [1.0, 1.0]),
    ]:
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            operator(*arguments[:place], value, *arguments[place + 1 :])
    for place in range(9, len(arguments)):
        if isinstance(arguments[place], bool):
            continue  # -1 is True
        with pytest.raises((RuntimeError, TypeError, ValueError), match=r"[Ee]xpected"):
            operator(*arguments[:place], -1, *arguments[place + 1 :])


# ---------------------------------------------------------------------------------------------------------------------
# torch takes the operators


def operator_of(rule: str, target: Target) -> Any:
    return getattr(torch.ops.mg_ops, f"{rule}_eager" if target.backend == "eager" else rule).default


def test_opcheck(rule: str, target: Target) -> None:
    arguments = operator_arguments(function=RULES[rule].function, **to_device(usual_arguments(rule), target.device))
    results = torch.library.opcheck(operator_of(rule, target), arguments)
    assert set(results.values()) == {"SUCCESS"} and len(results) == 4


def test_a_matcher_compiles(rule: str, target: Target) -> None:
    """fullgraph=True, with changing numbers of objects."""
    arguments = to_device(usual_arguments(rule), target.device)
    matcher = RULES[rule].matcher(**take_options(rule, arguments), backend=target.backend)
    torch._dynamo.reset()
    compiled = torch.compile(matcher.__call__, fullgraph=True, backend="aot_eager")
    for count in (5, 2, 1):
        objects = {name: [of_image[:count] for of_image in arguments[name]] for name in ("gt_boxes", "gt_labels")}
        assert_same_match(compiled(**arguments | objects), matcher(**arguments | objects), count)


def test_a_matcher_compiles_with_dynamic_shapes(rule: str, target: Target) -> None:
    arguments = to_device(usual_arguments(rule), target.device)
    options = take_options(rule, arguments)
    matcher = RULES[rule].matcher(**options, backend=target.backend)
    torch._dynamo.reset()
    compiled = torch.compile(matcher.__call__, dynamic=True, backend="eager")
    assert_same_match(compiled(**arguments), matcher(**arguments))


@pytest.mark.parametrize("mode", ["autocast", "inference_mode", "no_grad", "float64 default"])
def test_modes_do_not_change_the_result(rule: str, target: Target, mode: str) -> None:
    arguments = to_device(usual_arguments(rule), target.device)
    expected = call(rule, arguments, target)
    contexts = {
        "autocast": lambda: torch.autocast(target.device, dtype=torch.bfloat16),
        "inference_mode": torch.inference_mode,
    }
    torch.set_default_dtype(torch.float64 if mode == "float64 default" else torch.float32)
    try:
        with contexts.get(mode, torch.no_grad)():
            assert_same_match(call(rule, arguments, target), expected, mode)
    finally:
        torch.set_default_dtype(torch.float32)


def test_inputs_may_require_grad_and_none_flows(rule: str, target: Target) -> None:
    arguments = to_device(usual_arguments(rule), target.device)
    for name in ("anchors", "box_deltas", "cls_logits"):
        arguments[name].requires_grad_()
    assert not any(value.requires_grad for value in call(rule, arguments, target) if value is not None)
