"""Anatomies as data: keys, segments, and the JSON that a schedule carries."""

import json
from dataclasses import replace
from typing import Any

import pytest

from dicache.anatomy import Anatomy, AnatomyError, Site
from dicache.anatomy.parts import parse_span, span
from tests.tiny import Build, anatomy_of, every_model
from tests.toys import written


def changed(**entries: Any) -> dict[str, Any]:
    return {**written(4).to_json(), **entries}


def changed_block(**entries: Any) -> dict[str, Any]:
    content = written(4).to_json()
    return {**content, "blocks": [{**content["blocks"][0], **entries}]}


def without(content: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name != key}


def test_sites_are_named_by_block_and_branch_in_execution_order() -> None:
    assert written(2).sites == ("0.attn", "0.mlp", "1.attn", "1.mlp")


def test_every_block_lies_in_the_segment_that_holds_it() -> None:
    anatomy = written(5, (0, 2), (2, 5))
    assert [anatomy.segment(block) for block in range(5)] == [(0, 2), (0, 2), (2, 5), (2, 5), (2, 5)]


def test_the_latents_stream_is_the_only_one_or_that_which_is_named_so() -> None:
    [block] = written(1).blocks
    assert replace(block, returns="sequence").main_stream == "sequence"
    assert replace(block, returns=(None, "sequence")).main_stream == "sequence"
    assert replace(block, returns=("encoder_hidden_states", "hidden_states")).main_stream == "hidden_states"
    assert replace(block, returns=("context", "x")).main_stream == "x"
    assert replace(block, returns=("a", "b")).main_stream == ""


@every_model
def test_an_anatomy_survives_being_written_as_json_and_read(build: Build) -> None:
    anatomy = anatomy_of(build)
    assert Anatomy.from_json(json.loads(json.dumps(anatomy.to_json()))) == anatomy


def test_equal_neighbours_are_written_once_and_unequal_ones_apart() -> None:
    alike = written(4)
    assert [entry["blocks"] for entry in alike.to_json()["blocks"]] == ["0-3"]

    other = replace(alike.blocks[2], macs=7)
    unlike = replace(alike, blocks=(*alike.blocks[:2], other, alike.blocks[3]))
    assert [entry["blocks"] for entry in unlike.to_json()["blocks"]] == ["0-1", "2", "3"]
    assert Anatomy.from_json(unlike.to_json()) == unlike


def test_two_streams_and_a_missing_output_survive_the_round_trip() -> None:
    one = written(1)
    dual = replace(one, blocks=(replace(one.blocks[0], returns=(None, "hidden_states", "audio")),))
    read = Anatomy.from_json(json.loads(json.dumps(dual.to_json())))
    assert read == dual
    assert read.blocks[0].streams == ("hidden_states", "audio")


def test_modules_inside_a_fused_branch_survive_the_round_trip_and_are_left_out_where_there_are_none() -> None:
    one = written(1)
    fused = replace(one, blocks=(replace(one.blocks[0], sites=(Site("fused", "out", 9, ("up", "attn")),)),))
    assert Anatomy.from_json(json.loads(json.dumps(fused.to_json()))) == fused
    assert fused.to_json()["blocks"][0]["sites"]["fused"] == {"module": "out", "macs": 9, "inner": ["up", "attn"]}
    assert "inner" not in one.to_json()["blocks"][0]["sites"]["attn"]


def test_a_site_begins_with_the_first_of_its_modules() -> None:
    assert Site("fused", "out", inner=("up", "attn")).modules == ("up", "attn", "out")
    assert Site("fused", "out", inner=("up", "attn")).entrance == "up"
    assert Site("attn", "attn1").entrance == "attn1"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(colour="red"), "unknown key colour"),
        (without(changed(), "segments"), "missing key segments"),
        (changed_block(colour="red"), "unknown key colour"),
        (changed_block(sites={"attn": {"module": "attn1"}}), "missing key macs"),
        (
            changed_block(sites={"attn": {"module": "a", "macs": 1, "inner": "up"}}),
            "inner must be a list .* found 'up'",
        ),
        (changed_block(sites={"router": {"module": "r", "macs": 1}}), "unknown branch 'router'"),
        (changed_block(module="blocks.0-2"), "the counts differ"),
        (changed_block(blocks="1-4"), "must count from 0 in order: found 1-4 after 0"),
        (changed(segments=["0-2"]), "must both count 0 to 3"),
        (changed(segments=["0-1", "1-3"]), "must both count 0 to 3"),
        (changed(segments=["1-x"]), "'1-x' is not a range of blocks"),
        (changed(blocks=None), "cannot be read"),
        (changed(macs="many"), "cannot be read"),
        ([], "found list, needed an object"),
    ],
)
def test_a_broken_description_is_refused_and_says_what_is_wrong(content: Any, message: str) -> None:
    with pytest.raises(AnatomyError, match=message):
        Anatomy.from_json(content)


def test_a_span_names_both_ends_and_a_single_block_by_itself() -> None:
    assert (span(7, 27), span(7, 7)) == ("7-27", "7")
    assert (parse_span("7-27"), parse_span("7")) == ((7, 27), (7, 7))


@pytest.mark.parametrize("text", ["", "-3", "3-1", "a", "1-b", "1-2-3"])
def test_a_span_that_does_not_rise_from_zero_or_more_is_refused(text: str) -> None:
    with pytest.raises(AnatomyError, match="is not a range of blocks"):
        parse_span(text)
