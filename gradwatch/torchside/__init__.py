"""The ground room: torch's oddities, each known in one place, to the floors above it."""

from __future__ import annotations

from ._aside import Aside, are_modes_on, in_transform
from ._attention import PRODUCTS, Attended, AttentionTap, attended_fused, heads_of
from ._autograd import graph_task_id, in_backward
from ._bits import checksum, checksums, differ, num_bytes, pieces, put_bits
from ._checkpoints import checkpoints_around, in_recomputation, may_be_checkpointed
from ._compiled import compiled_parts, is_within
from ._copies import Kept, all_finite, fresh, kept, kept_tensors, local_piece, put_back, size_of
from ._devices import (
    Mark,
    accelerator,
    allocated_bytes,
    fetched,
    give_back_memory,
    home,
    is_host,
    mark,
    moved,
    random_state,
    sent,
    set_random_state,
    wait_for,
    wide_dtype,
)
from ._flat import is_flat_sharded
from ._graph import LossForm, loss_form, loss_pair, unmasked_attention
from ._inert import MethodHook, OwnedHook, StepHook, WeakHook, is_owned, weakly
from ._leaves import children, find, map_tensors, pick, storage, tensors_of, walk
from ._members import member, takes_hooks
from ._memory import (
    Lender,
    Lent,
    Loan,
    can_lend,
    can_lend_all,
    identities,
    identity,
    lend,
    lend_at_once,
    lend_in_passing,
    lend_one,
    storage_identity,
)
from ._modes import CallMode, past_override
from ._paths import WRAPPER_PARTS, clean_path
from ._peers import are_several, world_size
from ._pieces import Piece, StandIn, Whole, largest_piece, local_of, real_of, shape_of, whole_of
from ._same_kind import SameKind, stamps_of
from ._samples import Samples, unlike
from ._stages import Away, Pipeline, pipeline_of
from ._standins import Owned, masters, parameters_of
from ._untouched import every_random_state, set_every_random_state, untouched
from ._untraced import is_traced, uncompiled, untraced
from ._values import Values, declassed, dense, overlaps, owned, parts, values, why_unreadable, writable
from ._zero import ZeroPart, engine_of, is_split_by_zero

__all__ = [
    "PRODUCTS",
    "WRAPPER_PARTS",
    "Aside",
    "Attended",
    "AttentionTap",
    "Away",
    "CallMode",
    "Kept",
    "Lender",
    "Lent",
    "Loan",
    "LossForm",
    "MethodHook",
    "Mark",
    "Owned",
    "OwnedHook",
    "Piece",
    "Pipeline",
    "SameKind",
    "Samples",
    "StandIn",
    "StepHook",
    "Values",
    "WeakHook",
    "Whole",
    "ZeroPart",
    "all_finite",
    "accelerator",
    "allocated_bytes",
    "are_modes_on",
    "are_several",
    "attended_fused",
    "can_lend",
    "can_lend_all",
    "checkpoints_around",
    "checksum",
    "checksums",
    "children",
    "clean_path",
    "compiled_parts",
    "declassed",
    "dense",
    "differ",
    "engine_of",
    "every_random_state",
    "fetched",
    "find",
    "fresh",
    "give_back_memory",
    "graph_task_id",
    "heads_of",
    "home",
    "identities",
    "identity",
    "in_backward",
    "in_recomputation",
    "in_transform",
    "is_flat_sharded",
    "is_host",
    "is_owned",
    "is_split_by_zero",
    "is_traced",
    "is_within",
    "kept",
    "kept_tensors",
    "largest_piece",
    "lend",
    "lend_at_once",
    "lend_in_passing",
    "lend_one",
    "local_of",
    "local_piece",
    "loss_form",
    "loss_pair",
    "map_tensors",
    "mark",
    "masters",
    "may_be_checkpointed",
    "member",
    "moved",
    "num_bytes",
    "overlaps",
    "owned",
    "parameters_of",
    "parts",
    "past_override",
    "pick",
    "pieces",
    "pipeline_of",
    "put_back",
    "put_bits",
    "random_state",
    "real_of",
    "sent",
    "set_every_random_state",
    "set_random_state",
    "shape_of",
    "size_of",
    "stamps_of",
    "storage",
    "storage_identity",
    "takes_hooks",
    "tensors_of",
    "unlike",
    "unmasked_attention",
    "untouched",
    "uncompiled",
    "untraced",
    "values",
    "wait_for",
    "walk",
    "weakly",
    "whole_of",
    "why_unreadable",
    "wide_dtype",
    "world_size",
    "writable",
]
