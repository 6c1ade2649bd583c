"""Put balanced fusion nodes into a model, and take them out; any nn.Module, nothing is traced.

A node stands for a ``torch.cat`` or an add in some module's own forward: a module that does nothing else (YOLO's
``Concat``) or one that does much (a U-Net, an FPN). That module gets a class of its own in front of its own one, whose
forward runs the float forward unchanged while a ``TorchFunctionMode`` hands the n-th such call to the node. Calls by
children are not counted. Parameters keep their names; the nodes are in the child ``fusions``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from fewbits.errors import PlanError, QuantizationError, nearest
from fewbits.layers.base import QuantizedLayer
from fewbits.layers.fusion import BalancedFusion, FusionSettings, fusion_nodes
from fewbits.layers.fusion_sites import FusionSite, find_sites
from fewbits.layers.record import operands


class FusionOwner(nn.Module):
    """Mixin of a module in whose forward fusion nodes stand for cats and adds."""

    plain_class: ClassVar[type[nn.Module]]
    fusions: nn.ModuleDict

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the float forward returns, with its nodes balanced."""
        nodes: Any = self.fusions.values()
        for node in nodes:
            if node.settings.measure == "inputs":
                args = _watched_inputs(node, args)
        with _Intercept(self):
            return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (self.plain_class,), self.__dict__


def _watched_inputs(node: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments of an owner as views whose gradients its node notes."""
    if len(args) != len(node.branches) or not all(isinstance(x, Tensor) for x in args):
        raise QuantizationError(
            f"{node.label}: measure='inputs' needs a forward of {len(node.branches)} tensors, one a branch "
            f"{node.branches}, got {[type(x).__name__ for x in args]}; use measure='branches'"
        )
    return tuple(node.watched(args))


class _Intercept(TorchFunctionMode):
    """Hands calls of the owner's own forward to its nodes. inside: how many modules run below the owner."""

    def __init__(self, owner: FusionOwner) -> None:
        super().__init__()
        self.owner, self.inside = owner, 0
        self.counts: dict[str, int] = {}
        self.handles: list[Any] = []

    def __enter__(self) -> _Intercept:
        self.handles = [
            register_module_forward_pre_hook(lambda *_: self._move(1)),
            register_module_forward_hook(lambda *_: self._move(-1), always_call=True),
        ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        for handle in self.handles:
            handle.remove()

    def _move(self, by: int) -> None:
        self.inside += by

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the node that stands for this call, or func."""
        kwargs = kwargs or {}
        op = getattr(func, "__name__", "")
        joined = None if self.inside else operands(op, args, kwargs)
        if joined is None:
            return func(*args, **kwargs)
        kind, given, _ = joined
        nth = self.counts[kind] = self.counts.get(kind, -1) + 1
        nodes = self.owner.fusions
        if f"{kind}{nth}" not in nodes:
            return func(*args, **kwargs)
        if op == "add_":  # the caller may hold on to the tensor that is added to
            return given[0].copy_(nodes[f"{kind}{nth}"]([given[0].clone(), given[1]]))
        return nodes[f"{kind}{nth}"](given)


_CLASSES: dict[type, type[FusionOwner]] = {}


def _owner_class(plain: type[nn.Module]) -> type[FusionOwner]:
    if plain not in _CLASSES:

        @functools.wraps(plain.forward)  # exporters look at its signature
        def forward(self: FusionOwner, *args: Any, **kwargs: Any) -> Any:
            return FusionOwner.forward(self, *args, **kwargs)

        namespace = {"plain_class": plain, "forward": forward, "__module__": __name__}
        _CLASSES[plain] = type(f"Balanced{plain.__name__}", (FusionOwner, plain), namespace)
    return _CLASSES[plain]


def _rebuild(plain: type[nn.Module]) -> FusionOwner:
    cls = _owner_class(plain)
    return cls.__new__(cls)


def balance_fusion(
    model: nn.Module,
    example: Any,
    nodes: Sequence[str] | str = "auto",
    settings: FusionSettings | None = None,
) -> dict[str, BalancedFusion]:
    """Balance fusion nodes of a model in place; return them by name.

    example: a batch, as for ``calibrate``: one forward shows where branches meet. nodes: "auto" for those that fuse
    different scales (``find_sites`` tells all), or names: of a site, such as ``decoder.cat0`` (the first cat in the
    forward of ``decoder``), or of a module with one site. Balance before ``quantize``, or after it.
    Raises PlanError, and leaves the model as it is, for a name that is not there or that has several sites, for "auto"
    where nothing fuses scales, and for a model that is balanced already.
    """
    if fusion_nodes(model):
        raise PlanError(f"this model is balanced already, at {list(fusion_nodes(model))}: call remove_fusion first")
    sites = find_sites(model, example)
    chosen = _automatic(sites) if nodes == "auto" else _named(sites, [nodes] if isinstance(nodes, str) else nodes)
    modules = dict(model.named_modules())
    tensors = [*model.parameters(), *model.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")  # a module that only concatenates has none
    made = {site.name: _make(site, modules[site.owner], settings).to(device) for site in chosen}
    for site in chosen:
        owner = modules[site.owner]
        if not isinstance(owner, FusionOwner):
            owner.__class__ = _owner_class(type(owner))
            owner.fusions = nn.ModuleDict()
        owner.fusions[site.key] = made[site.name]
    return made


def _automatic(sites: Sequence[FusionSite]) -> list[FusionSite]:
    found = [site for site in sites if site.fuses]
    if not found:
        raise PlanError(
            "no node of this model fuses different scales in front of a layer with a weight; name the nodes, of "
            f"{[site.name for site in sites][:12]}"
        )
    return found


def _named(sites: Sequence[FusionSite], names: Sequence[str]) -> list[FusionSite]:
    if not names:
        raise PlanError("no fusion nodes are named: give names, or 'auto'")
    return list(dict.fromkeys(_one(sites, name) for name in names))


def _one(sites: Sequence[FusionSite], name: str) -> FusionSite:
    hits = [s for s in sites if s.name == name] or [s for s in sites if s.owner == name]
    if len(hits) == 1:
        return hits[0]
    known = [s.name for s in sites]
    if hits:
        raise PlanError(f"module {name!r} has {len(hits)} fusions: name one of {[s.name for s in hits]}")
    hint = nearest(name, known) or f"; the nodes of this model are {known[:12]}"
    raise PlanError(
        f"no fusion node {name!r}: a node is a cat or an add of two or more tensors of equal size but for a cat's "
        f"channels, [N, C, ...]{hint}"
    )


def _make(site: FusionSite, owner: nn.Module, settings: FusionSettings | None) -> BalancedFusion:
    if isinstance(owner, QuantizedLayer) or "forward" in vars(owner):
        why = "is quantized as one layer" if isinstance(owner, QuantizedLayer) else "has its forward replaced"
        raise PlanError(f"fusion node {site.name!r} is in the forward of a module that {why}: leave it out")
    own = getattr(owner, "branches", ())  # a module may name its branches
    names = tuple(own) if len(own) == len(site.branches) else site.branches
    node = BalancedFusion(names, settings, op=site.op, axis=site.axis, label=f"fusion node {site.name!r}")
    node.owned = True
    return node.train(owner.training)


def remove_fusion(model: nn.Module, names: Sequence[str] | None = None) -> nn.Module:
    """Put the plain operators back, in place, of the named nodes or of all; gains and norms are dropped, not folded."""
    nodes = fusion_nodes(model)
    for name in nodes if names is None else names:
        owner_name, _, key = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        if not isinstance(owner, FusionOwner):
            nodes[name].settings = FusionSettings(mode="off", norm=False)  # a node that the model itself has
            continue
        del owner.fusions[key]
        if not owner.fusions:
            del owner._modules["fusions"]
            owner.__class__ = owner.plain_class  # type: ignore[assignment]
    return model
