"""Which rule a module gets: the one place that decides it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from torch_secorder.capture.records import Call
from torch_secorder.errors import ArgumentError, CurvatureError, ShapeError, UnsupportedError
from torch_secorder.model.packed import Shapes, declare_shapes
from torch_secorder.model.ranks import class_as_written
from torch_secorder.per_sample import Dense, PerSampleGradient

Gradients = Mapping[str, PerSampleGradient | Tensor]
Refusal = TypeVar("Refusal", bound=Callable[[Any], CurvatureError | None])
Function = TypeVar("Function", bound=Callable[[Any, Call], Gradients])

# Methods that a subclass may change without changing what the layer computes.
HARMLESS = {
    "__init__",
    "__repr__",
    "__str__",
    "__doc__",
    "extra_repr",
    "reset_parameters",
    "__module__",
    "__annotations__",
}


@dataclass(frozen=True)
class Rule:
    """A registered rule.

    Attributes:
        name: what the report's ``rule`` column says.
        function: the rule itself.
        layer: the class that it was written for.
        depends_on: the attributes that the rule reads from a module; None if that is not known. Calls of modules that agree in
            these attributes, in their shapes and in their parameters' shapes can be computed together.
    """

    name: str
    function: Callable[[Any, Call], Gradients]
    layer: type[nn.Module]
    depends_on: tuple[str, ...] | None = None

    def __call__(
        self, module: nn.Module, call: Call, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, PerSampleGradient]:
        """The per-sample gradients of the parameters in ``shapes``, checked against those shapes."""
        found = self.function(module, call)
        if not isinstance(found, Mapping):
            raise UnsupportedError(f"the rule for {self.layer.__name__} returned {found!r}, not a mapping")
        n = call.grad_output.shape[0]
        forms: dict[str, PerSampleGradient] = {}
        for name, shape in shapes.items():
            if name not in found:
                raise UnsupportedError(f"the rule for {self.layer.__name__} says nothing of its parameter '{name}'")
            value = found[name]
            form = forms[name] = Dense(value) if isinstance(value, Tensor) else value
            if (form.n, form.shape) != (n, shape):
                raise ShapeError(
                    f"the rule for {self.layer.__name__} gave '{name}' gradients of shape "
                    f"{(form.n, *form.shape)} where (N, *shape) is {(n, *shape)}"
                )
        return forms


_rules: dict[type[nn.Module], Rule] = {}
_forwards: dict[Hashable, tuple[Callable[..., Any], tuple[str, ...], Any]] = {}
_refusals: dict[type[nn.Module], Callable[[Any], CurvatureError | None]] = {}


def register_rule(
    *layers: type[nn.Module],
    name: str | None = None,
    depends_on: Sequence[str] | None = None,
    shapes: Shapes | None = None,
) -> Callable[[Function], Function]:
    """A decorator that teaches the library a layer.

    The function gets the module and one :class:`~torch_secorder.rules.Call` of it, and returns a mapping from the
    module's own parameter names to per-sample gradients of the batch's loss: a tensor ``(N, *shape)``, or a factored form
    of :mod:`torch_secorder.per_sample`. In the call, ``inputs``, ``kwargs`` and ``grad_output`` have the batch axis
    first. Averaging, ``loss_scale`` and N are the library's business.

    A rule holds for subclasses too, as long as they compute the same: a class or an instance with another ``forward`` is
    not the layer that it inherits from. Registering a class again replaces its rule.

    Args:
        layers: module classes.
        name: the rule's name in the report; the function's name by default.
        depends_on: the attributes of the module that the rule reads, besides its parameters' shapes, if it reads nothing else
            and one input tensor. Small calls of several modules are then computed together, which saves time. By default they
            are not.
        shapes: for parameters that hold packed codes of a weight, a function from the module to the weights' shapes by the
            parameters' names. Gradients, the report and the diagonal have these shapes then.

    Raises:
        ArgumentError: for something that is not a subclass of ``torch.nn.Module``.

    Example:
        >>> import torch
        >>> from torch_secorder import empirical_fisher_trace, register_rule
        >>> class Scale(torch.nn.Module):
        ...     def __init__(self, width):
        ...         super().__init__()
        ...         self.weight = torch.nn.Parameter(torch.ones(width))
        ...     def forward(self, x):
        ...         return x * self.weight
        >>> @register_rule(Scale)
        ... def scale(module, call):
        ...     return {"weight": call.inputs[0] * call.grad_output}
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> empirical_fisher_trace(Scale(2), lambda out, _: out.sum(1).mean(), x, None)
        tensor(15.)
    """
    for layer in layers:
        if not (isinstance(layer, type) and issubclass(layer, nn.Module)):
            raise ArgumentError(f"register_rule takes subclasses of torch.nn.Module, not {layer!r}")

    def register(function: Function) -> Function:
        for layer in layers:
            declare_shapes(layer, shapes)
            _rules[layer] = Rule(
                name or function.__name__, function, layer, None if depends_on is None else tuple(depends_on)
            )
        return function

    return register


def register_forward(*written: Callable[..., Any], parameters: tuple[str, ...]) -> Callable[[Function], Function]:
    """A decorator for the rule of every layer, of whatever class, whose forward has the code of one of these functions.

    Args:
        written: forwards as functions, to compare code with; they are not called.
        parameters: the names of all parameters that such a layer has.
    """

    def register(function: Function) -> Function:
        for forward in written:
            _forwards[_code(forward)] = forward, parameters, function
        return function

    return register


def register_refusal(*layers: type[nn.Module]) -> Callable[[Refusal], Refusal]:
    """A decorator for a function that says, before each call of a layer, why no rule can be right; None if one can."""

    def register(function: Refusal) -> Refusal:
        for layer in layers:
            _refusals[layer] = function
        return function

    return register


def refusal_for(kind: type) -> Callable[[Any], CurvatureError | None] | None:
    """The function that must run before each call of a module of this class, if there is one."""
    return next((_refusals[layer] for layer in kind.__mro__ if layer in _refusals), None)


@dataclass(frozen=True)
class ClassRule:
    """The rule that all modules of one class have, unless something about the module itself stands against it.

    Attributes:
        rule: the rule, if there is one.
        parameters: the names of all parameters that a module must own, if the rule was found by the code of the forward.
        changed: the methods that the class computes differently than the layer that the rule was written for.
    """

    rule: Rule | None
    parameters: tuple[str, ...] | None = None
    changed: Sequence[str] = ()


def rule_for(module: nn.Module, classes: dict[type[nn.Module], ClassRule] | None = None) -> Rule | str:
    """The rule for a module, or the reason why it has none.

    Args:
        module: the module.
        classes: what this function has noted about classes in earlier calls, for callers that ask about many modules at a time.
    """
    kind, classes = type(module), {} if classes is None else classes
    of_class = classes.get(kind) or classes.setdefault(kind, _class_rule(class_as_written(module)))
    rule, parameters = of_class.rule, of_class.parameters
    if rule is None or (parameters is not None and not _owns_only(module, parameters)):
        return f"no rule for {class_as_written(module).__name__}"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if [p for p in module._parameters.values() if p is not None and p.is_complex()]:
        return "its parameters are complex, and rules are written for real ones"
    if computed := _computed_tensors(module):
        return f"its {', '.join(computed)} is computed from other tensors (pruning, weight_norm, a parametrization)"
    if of_class.changed:
        return f"a {rule.layer.__name__} that changes {', '.join(of_class.changed)}"
    return rule


def _class_rule(kind: type[nn.Module]) -> ClassRule:
    """What the class of a module alone says about its rule."""
    layer = next((layer for layer in kind.__mro__ if layer in _rules), None)
    if layer is None:
        return _rule_by_code(kind)
    return ClassRule(_rules[layer], changed=_overridden(kind, layer) if kind is not layer else ())


# Classes of most attributes of modules, none of which is a tensor.
_NO_TENSORS = {bool, int, float, str, type(None), tuple, list, set, dict, OrderedDict}


def _computed_tensors(module: nn.Module) -> list[str]:
    """The names under which a module has tensors that are neither its parameters nor its buffers."""
    computed: list[str] = []
    if not _NO_TENSORS.issuperset(map(type, vars(module).values())):
        computed += [local for local, value in vars(module).items() if isinstance(value, Tensor)]
    if module._modules.get("parametrizations") is not None and is_parametrized(module):
        computed += [local for local, _ in module.parametrizations.named_children()]  # type: ignore[union-attr]  # a ModuleDict there
    return computed


def _code(function: Any) -> Hashable:
    """A key that is equal for two functions with the same code; None if it is not a plain function."""
    code = getattr(function, "__code__", None)
    if code is None or function.__defaults__ or function.__kwdefaults__ or function.__closure__:
        return None
    return code.co_code, code.co_consts, code.co_names, code.co_varnames, code.co_argcount


def _rule_by_code(kind: type[nn.Module]) -> ClassRule:
    """The rule for a class that nobody registered, if its forward has code that is known and finds what that expects."""
    forward: Any = getattr(kind, "forward", None)  # Classes of scripted modules have none.
    found = _forwards.get(_code(forward))
    if found is None:
        return ClassRule(None)
    written, parameters, function = found
    names = written.__code__.co_names  # global names, and those of attributes
    same_globals = all(forward.__globals__.get(name) is written.__globals__.get(name) for name in names)
    above = kind.__mro__[: kind.__mro__.index(nn.Module)]
    special = {"__call__", "__getattr__", "__getattribute__", *names}  # as properties they would be the class's own
    plain = special.isdisjoint(name for cls in above for name in vars(cls))
    return ClassRule(Rule(function.__name__, function, kind) if same_globals and plain else None, parameters)


def _owns_only(module: nn.Module, parameters: Sequence[str]) -> bool:
    """Whether these are all the parameters that a module owns, and it has no modules inside."""
    return next(module.children(), None) is None and {
        name for name, p in module._parameters.items() if p is not None
    } == set(parameters)


def _overridden(kind: type, layer: type) -> list[str]:
    """The methods of ``layer`` that ``kind`` or a class between the two computes differently."""
    between = kind.__mro__[: kind.__mro__.index(layer)]
    names = {
        name for cls in between for name, value in vars(cls).items() if callable(value) or isinstance(value, property)
    }
    return sorted(
        name for name in names - HARMLESS if hasattr(layer, name) and getattr(kind, name) is not getattr(layer, name)
    )
