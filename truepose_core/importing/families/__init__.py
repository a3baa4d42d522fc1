"""Weights of other systems: read, recognised and converted to one file of ours."""

from __future__ import annotations

from truepose_core.importing.families.animate_anyone import AnimateAnyone
from truepose_core.importing.families.cfld import CFLD
from truepose_core.importing.families.champ import Champ
from truepose_core.importing.families.ip_adapter import IPAdapter
from truepose_core.importing.families.leffa import Leffa
from truepose_core.importing.plan import Family

FAMILIES: tuple[Family, ...] = (AnimateAnyone(), Champ(), Leffa(), CFLD(), IPAdapter())
"""Every kind of weights that can be read, in the order in which they are asked."""
