"""Solve a fixed point and attach a gradient: the function, and the module that remembers how."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback

from phantom.check import check
from phantom.confirm import Confirming
from phantom.gradient.base import GradientEstimator
from phantom.gradient.unroll import UPG
from phantom.report import SOLVE, OnFailure, act, check_on_failure
from phantom.runtime import transforms
from phantom.runtime.frozen import forget_without_graph, frozen, twice_differentiable
from phantom.runtime.host import can_ask, is_exporting, is_traced
from phantom.runtime.purity import Pure
from phantom.runtime.ranks import Group, name_of
from phantom.solution import Solution, Stats
from phantom.solve import solve
from phantom.solver.base import Solver
from phantom.solver.broyden import Broyden
from phantom.state import FlatMap, Map, Packing, State, form_of
from phantom.validate import check_choice, check_count, check_kind

Returns = Literal["best", "last"]
RETURNS = get_args(Returns)
SOLVER, GRAD = Broyden(), UPG()  # the defaults

Clock = Callable[[str], AbstractContextManager]
Regularizer = Callable[[Map, State], Tensor]


def fixed_point(
    f: Map,
    z0: State,
    *,
    solver: Solver | None = None,
    grad: GradientEstimator | None = None,
    regularizer: Regularizer | None = None,
    gradient_precision: torch.dtype | None = None,
    in_place: bool = False,
    confirm: bool = True,
    on_failure: OnFailure = "useless",
    group: Group = None,
    returns: Returns = "best",
    states: Sequence[int] = (),
    unrolled: bool = False,
    debug: bool = False,
    clock: Clock = nullcontext,
) -> Solution:
    """Solve z = f(z) without a graph, then attach the gradient estimate when grad is enabled.

    Args:
        f: closed map of states: input, masks and effective weights are bound already, the same at every step.
        z0: initial guess with a leading axis of B independent problems: a tensor, or a tuple, list, dict or namedtuple
            of tensors, nested as it may be.
        solver: finds z_star; `Broyden()` by default.
        grad: gives the value its backward; not used under `torch.no_grad()`, where the value is z_star. `UPG()` by
            default.
        regularizer: a differentiable penalty of f at the detached equilibrium, such as `JacobianRegularizer`.
        gradient_precision: dtype of autocast in the evaluations of f with a graph, and so in their backward; None keeps
            the caller's. bfloat16 here barely changes the gradient. In the solve it would hurt a lot, so the solve
            keeps the dtype of its caller, and so does the regularizer.
        in_place: f returns memory of its own at every call and keeps none of it, so that the solver may write there.
            Of a tuple state that is so in any case.
        confirm: where the best iterates of the problems are of different steps, measure the residual of the state that
            they make together, which is another one if the problems depend on each other. The evaluation is that of
            the estimator; under `torch.no_grad()`, and in the backward solve, it is one more; torch.export records
            none. False where they are known not to.
        on_failure: what to do about a solve that failed, here and in the backward: "useless" warns once of an outcome
            that is no answer; "warn" and "raise" speak of every problem above `tol`; "ignore"; or a function that is
            called with the statistics. Read where the host waits anyway: with a `tol` and a `sync_every`, or on a CPU.
            Another solve is read by `phantom.report.act_where_nobody_did(solution.stats)`, to be called after backward,
            where you wait yourself.
        group: the process group whose ranks stop together, here and in the backward: a `ProcessGroup`, its name, or
            "world". Needed where f communicates (`SyncBatchNorm`, `fully_shard`) and a solver has a `tol`: every rank
            must evaluate f equally often, else they wait for each other for ever. All ranks of it must call this with
            the same settings; a rank that has stopped evaluates f at what it holds. Costs an all-reduce of one number
            where a solve asks whether its problems have stopped. The memory of Anderson and Broyden is that of a rank's
            own problems: where f couples those of several ranks strongly, `FixedPoint` converges better.
        returns: "best", the iterate of the smallest residual, or "last", the one that was evaluated last; its residual
            is then the one reported. A problem that has met `tol` or diverged stays where it was best.
        states: steps t of the solve whose state shall be in `Solution.states`, in this order: z_t, the best iterate of
            the first t steps, or z_star where the solve has ended before, with the gradient of `grad` attached to it as
            to z_star. A loss w l(value) + sum_t w_t l(states[t]) is the sparse fixed-point correction of Bai et al.,
            *Deep Equilibrium Optical Flow Estimation* (2022). Each costs what the `attach` and the backward of `grad`
            cost; the iterate itself is a constant. What their backward costs is not in `stats`. Not with BPTT and
            SHINE.
        unrolled: keep the states after each step of UPG or BPTT, with their graph, in `Solution.unrolled`.
        debug: ask `phantom.check` about f first, and raise what it says; a few evaluations more.
        clock: called with "solve" and "attach", the context managers it returns time the two phases.

    Raises:
        SolveError: the solve has failed, with `on_failure="raise"`.
        ValueError: with `debug`, where f is no map to solve; under torch.export, where the solver has a `tol` and a
            `sync_every`.

    Returns:
        Solution: value, z0 and z_star in the form of `z0`.
    """
    solver, grad = SOLVER if solver is None else solver, GRAD if grad is None else grad
    _check_settings(solver, grad, regularizer, on_failure, returns, gradient_precision)
    _check_extras(states, unrolled, grad)
    group = name_of(group)
    if _is_compiled_around(grad, regularizer):
        from phantom.runtime.compiled import outside

        return outside(
            f,
            z0,
            solver=solver,
            grad=grad,
            regularizer=regularizer,
            gradient_precision=gradient_precision,
            in_place=in_place,
            confirm=confirm,
            on_failure=on_failure,
            group=group,
            returns=returns,
            states=states,
            unrolled=unrolled,
            debug=debug,
            clock=clock,
        )
    _check_surroundings(solver)
    if debug and (findings := check(f, z0)):
        raise ValueError(" ".join(findings))
    packing = Packing(z0)
    flat_f, start = _flat(f, packing), _differentiable(packing.pack(z0))
    computed_in, differentiate = packing.computed_in(), torch.is_grad_enabled()
    with clock("solve"):
        flat, iterates = _solve(
            flat_f,
            start,
            solver,
            grad,
            states,
            in_place=in_place or packing.joins,
            group=group,
            last=returns == "last",
            computed_in=computed_in,
        )
    stats = flat.stats
    stats.group, stats.on_failure, stats.confirm = group, on_failure, confirm
    stats.computed_in, stats.differentiated_in = computed_in, gradient_precision or computed_in
    unsure = confirm and not (stats.confirmed or transforms.are_active() or is_exporting())
    if differentiate:
        with clock("attach"):
            if gradient_precision is not None:
                with torch.autocast(start.device.type, dtype=gradient_precision):
                    flat_f = _flat(f, packing, flat_f.writes)  # f keeps the autocast it is wrapped under
            flat.unrolled = [] if unrolled else None
            confirms = unsure and gradient_precision is None
            _attach(Confirming(flat_f, stats, solver) if confirms else flat_f, flat, grad)
            iterates = [_attach_at(z, flat_f, flat, grad) for z in iterates]
    elif unsure:
        with clock("solve"):
            Confirming(flat_f, stats, solver)(flat.z_star)
            stats.num_evals += 1
    if on_failure != "ignore" and stats.num_evals and can_ask(flat.z_star, solver):
        act(stats, on_failure, of=SOLVE)
    # the value is the user's to write to: it shares memory with neither z_star nor what the graph has saved
    solution = Solution(
        value=packing.unpack(flat.value, copy=True),
        z0=z0,
        z_star=packing.unpack(flat.z_star),
        stats=stats,
        history=flat.history,
        states=tuple(packing.unpack(z, copy=True) for z in iterates),
        unrolled=None if flat.unrolled is None else [packing.unpack(z, copy=True) for z in flat.unrolled],
    )
    if differentiate and regularizer is not None:
        with clock("attach"), twice_differentiable():  # a penalty may differentiate f twice
            solution.penalty = regularizer(f, solution.z_star)
    return solution


def _solve(
    f: Pure, start: Tensor, solver: Solver, grad: GradientEstimator, states: Sequence[int], **settings: Any
) -> tuple[Solution, list[Tensor]]:
    """Return the solve from `start` (B, D), or `start` where `grad` needs none, and the iterates z_t of `states`.

    Args:
        settings: of `phantom.solve.solve`.
    """
    z0, visited = start.detach(), {}
    if torch.is_grad_enabled() and not grad.needs_equilibrium:
        return Solution(value=z0, z0=start, z_star=z0, stats=Stats.of_no_solve(z0)), []

    def watch(step: int, best: Tensor) -> None:
        if step in states:
            visited[step] = best.clone()

    run = transforms.solve if transforms.are_active() else solve
    z_star, stats, history = run(f, z0, solver, watch=watch if states else None, **settings)
    forget_without_graph()
    flat = Solution(value=z_star, z0=start, z_star=z_star, stats=stats, history=history if grad.needs_history else None)
    return flat, [visited.get(step, z_star) for step in states]


def _attach(f: FlatMap, flat: Solution, grad: GradientEstimator) -> None:
    """Give `flat.value` the gradient of `grad`."""
    flat.value = grad.attach(f, flat)
    if not isinstance(flat.value, Tensor) or flat.value.shape != flat.z0.shape:
        raise ValueError(
            f"{type(grad).__name__}.attach must return a tensor {tuple(flat.z0.shape)}, the shape of z_star, got "
            f"{form_of(flat.value)}"
        )
    if not grad.needs_equilibrium:
        flat.z_star = flat.value.detach()


def _differentiable(start: Tensor) -> Tensor:
    """Return `start`; of one that was made under `torch.inference_mode()`, which no graph takes, return a copy."""
    kept = not is_traced(start) and start.is_inference() and not torch.is_inference_mode_enabled()
    return start.clone() if kept else start


def _flat(f: Map, packing: Packing, writes: bool | None = None) -> Pure:
    """Return f as a map of (B, D) tensors; where it is a compiled module, with a map for products with its Jacobian."""
    flat_f, held = packing.wrap(f), frozen(f)
    return Pure(flat_f, writes, None if held is None else Pure(packing.wrap(held), writes))


def _check_extras(states: Sequence[int], unrolled: bool, grad: GradientEstimator) -> None:
    if not isinstance(states, Sequence):
        example = f"({states},)" if isinstance(states, int) else "(5, 10)"
        raise TypeError(f"states={states!r} must be a sequence of steps, such as {example}")
    for step in states:
        check_count("states", step, least=1, also=", a step of the solve; value is the state at its end")
    if states and (grad.needs_history or not grad.needs_equilibrium):
        way = "unrolled=True gives its steps" if grad.unrolls else "use UPG, NPG or Implicit"
        raise ValueError(f"states={tuple(states)} cannot have the gradient of {type(grad).__name__}: {way}")
    if unrolled and not grad.unrolls:
        raise ValueError(f"unrolled=True needs UPG or BPTT: {type(grad).__name__} unrolls no steps")


def _check_settings(
    solver: object,
    grad: object,
    regularizer: object,
    on_failure: object,
    returns: str,
    precision: torch.dtype | None,
) -> None:
    check_kind("solver", solver, Solver, "Broyden()")
    check_kind("grad", grad, GradientEstimator, "UPG()")
    if regularizer is not None and (isinstance(regularizer, type) or not callable(regularizer)):
        raise TypeError(
            "regularizer must be callable as regularizer(f, z), such as JacobianRegularizer(), or None, got "
            f"{regularizer!r}"
        )
    check_on_failure(on_failure)
    check_choice("returns", returns, RETURNS)
    if precision not in (None, torch.bfloat16, torch.float16):
        raise ValueError(
            f"gradient_precision={precision} is no dtype of autocast: choose torch.bfloat16, torch.float16 or None, "
            "which keeps the caller's"
        )


def _check_surroundings(solver: Solver) -> None:
    """Raise where torch records what is run, or differentiates it, in a way that a solve cannot have."""
    if solver.asks and is_exporting():
        raise ValueError(
            f"torch.export records a fixed number of steps, and solver.tol={solver.tol} asks for as many as it takes: "
            "give a solver with tol=None, dataclasses.replace(solver, max_steps=..., tol=None), or one with "
            "sync_every=None, which runs all its steps and holds the problems that have converged"
        )
    if not torch.is_grad_enabled() and transforms.are_active() and transforms.is_forward_mode():
        raise RuntimeError(
            "forward mode differentiates under torch.no_grad() and inference mode, too, and an equilibrium needs grad "
            "for that: call it outside of them. If it is a constant there, as a start is, solve it before the transform"
        )
    if not torch.compiler.is_dynamo_compiling() and transforms.is_linearized():
        raise RuntimeError(
            "torch.func.linearize records operators, and a solve reads numbers: use torch.func.jvp, which does not"
        )


def _attach_at(z: Tensor, f: FlatMap, solution: Solution, grad: GradientEstimator) -> Tensor:
    """Return the iterate `z` of the solve with the gradient attached to it, which counts in `solution.stats`."""
    stats = Stats.of_no_solve(z)
    stats.follow(solution.stats)
    value = grad.attach(f, Solution(value=z, z0=solution.z0, z_star=z, stats=stats))
    solution.stats.num_evals += stats.num_evals
    return value


def _is_compiled_around(grad: GradientEstimator, regularizer: Regularizer | None) -> bool:
    """Return whether torch.compile is at work around what it cannot trace: a solve, or a penalty, whose backward
    differentiates f twice. An unrolled iteration alone it can.
    """
    if torch.compiler.is_dynamo_compiling():
        return grad.needs_equilibrium or regularizer is not None or not torch.is_grad_enabled()
    return get_eval_frame_callback() not in (None, False)


class DEQ(nn.Module):
    """A deep equilibrium layer without parameters: how to solve, and how to differentiate.

    `forward(f, z0)` is `fixed_point` with these settings. The settings are plain attributes holding immutable
    objects: replace one to change a run on the way (pretraining phase, jitter of the budget, another estimator).

    Args:
        solver: used in training mode, and in evaluation mode unless `eval_solver` is given.
        grad: the gradient estimator; it looks at whether grad is enabled, never at `.training`.
        eval_solver: used in evaluation mode.
        regularizer: its value leaves as `Solution.penalty`.
        gradient_precision: dtype of autocast where f has a graph; see `fixed_point`.
        confirm: measure the residual of the returned state where its problems stopped apart; see `fixed_point`.
        on_failure: what to do about a solve that failed; see `fixed_point`.
        group: the process group whose ranks stop together, because f communicates; see `fixed_point`.
        returns: the best iterate or the last one; see `fixed_point`.
    """

    def __init__(
        self,
        *,
        solver: Solver | None = None,
        grad: GradientEstimator | None = None,
        eval_solver: Solver | None = None,
        regularizer: Regularizer | None = None,
        gradient_precision: torch.dtype | None = None,
        confirm: bool = True,
        on_failure: OnFailure = "useless",
        group: Group = None,
        returns: Returns = "best",
    ) -> None:
        super().__init__()
        solver, grad = SOLVER if solver is None else solver, GRAD if grad is None else grad
        _check_settings(solver, grad, regularizer, on_failure, returns, gradient_precision)
        if eval_solver is not None:
            check_kind("eval_solver", eval_solver, Solver, "Broyden()")
        self.solver = solver
        self.grad = grad
        self.eval_solver = eval_solver
        self.regularizer = regularizer
        self.gradient_precision = gradient_precision
        self.confirm = confirm
        self.on_failure: OnFailure = on_failure
        self.group = name_of(group)
        self.returns: Returns = returns
        self.clock: Clock = nullcontext

    def forward(
        self,
        f: Map,
        z0: State,
        *,
        solver: Solver | None = None,
        in_place: bool = False,
        states: Sequence[int] = (),
        unrolled: bool = False,
    ) -> Solution:
        """Return the equilibrium of `f` from `z0`, by `solver` this time if one is given; see `fixed_point`."""
        if solver is None:
            solver = self.solver if self.training or self.eval_solver is None else self.eval_solver
        return fixed_point(
            f,
            z0,
            solver=solver,
            grad=self.grad,
            regularizer=self.regularizer,
            gradient_precision=self.gradient_precision,
            in_place=in_place,
            confirm=self.confirm,
            on_failure=self.on_failure,
            group=self.group,
            returns=self.returns,
            states=states,
            unrolled=unrolled,
            clock=self.clock,
        )

    def extra_repr(self) -> str:
        return f"solver={self.solver}, grad={self.grad}, eval_solver={self.eval_solver}, regularizer={self.regularizer}"


def deqs_of(model: nn.Module) -> list[DEQ]:
    """Return the DEQ layers inside `model`."""
    return [module for module in model.modules() if isinstance(module, DEQ)]
