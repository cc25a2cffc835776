"""Tiny transformers of every class of diffusers, by name."""

from tests.transformers.adapted_video import ADAPTED_VIDEO
from tests.transformers.audio import AUDIO
from tests.transformers.dual_stream import DUAL_STREAM
from tests.transformers.flux_like import FLUX_LIKE
from tests.transformers.joint_video import JOINT_VIDEO
from tests.transformers.one_row import ONE_ROW
from tests.transformers.single_stream import SINGLE_STREAM
from tests.transformers.tiny_transformer import Tiny
from tests.transformers.video import VIDEO

TRANSFORMERS: dict[str, Tiny] = {
    **SINGLE_STREAM,
    **ONE_ROW,
    **DUAL_STREAM,
    **FLUX_LIKE,
    **VIDEO,
    **JOINT_VIDEO,
    **ADAPTED_VIDEO,
    **AUDIO,
}
