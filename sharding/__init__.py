"""The language of shardings, the rules of primitives, and propagation. Needs no device."""

import sharding.rules  # noqa: F401  (registers every rule)
from sharding.annotate import P as P
from sharding.annotate import Priority as Priority
from sharding.annotate import constrain_with as constrain_with
from sharding.annotate import shard as shard
from sharding.custom import rule as rule
from sharding.errors import ArgumentError as ArgumentError
from sharding.errors import ArgumentTypeError as ArgumentTypeError
from sharding.errors import DonationError as DonationError
from sharding.errors import GatherError as GatherError
from sharding.errors import MeshError as MeshError
from sharding.errors import Problem as Problem
from sharding.errors import RuleError as RuleError
from sharding.errors import ShardingWarning as ShardingWarning
from sharding.errors import SpecError as SpecError
from sharding.errors import SpmdError as SpmdError
from sharding.errors import StrictError as StrictError
from sharding.errors import VerificationError as VerificationError
from sharding.mesh import MeshShape as MeshShape
from sharding.program import Program as Program
from sharding.propagation import Propagated as Propagated
from sharding.propagation import propagate as propagate
from sharding.rule import Factor as Factor
from sharding.rule import Kind as Kind
from sharding.rule import Local as Local
from sharding.rule import Rule as Rule
from sharding.rule import register as register
from sharding.spec import DimSharding as DimSharding
from sharding.spec import Layout as Layout
from sharding.spec import Sharding as Sharding

__all__ = [
    "ArgumentError", "ArgumentTypeError", "DimSharding", "DonationError", "Factor", "GatherError",
    "Kind", "Layout", "Local", "MeshError", "MeshShape", "P", "Priority", "Problem", "Program",
    "Propagated", "Rule", "RuleError", "Sharding", "ShardingWarning", "SpecError", "SpmdError",
    "StrictError", "VerificationError", "constrain_with", "propagate", "register", "rule", "shard",
]  # fmt: skip
