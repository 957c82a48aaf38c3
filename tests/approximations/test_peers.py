"""The Fisher traces of other packages, where they are right: `peer_errors.py` has the models, and each one's scaling."""

from __future__ import annotations

import pytest

from peer_errors import LOSSES, MODELS, PEERS, Peer, errors, main

REASON = "`make test` installs it without its requirements: torchvision does not load beside every build of torch"


@pytest.fixture(params=PEERS, ids=lambda peer: peer.name)
def peer(request: pytest.FixtureRequest) -> Peer:
    pytest.importorskip("backpack" if request.param.name.startswith("BackPACK") else "curvlinops", reason=REASON)
    return request.param


@pytest.mark.filterwarnings("ignore::Warning")  # of the packages' own
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("model", MODELS)
def test_a_peer_agrees(peer: Peer, model: str, loss: str) -> None:
    total, worst = errors(peer, model, loss)
    assert total <= peer.tolerance
    assert worst <= peer.tolerance


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::Warning")
def test_the_table_of_errors(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("backpack", reason=REASON)
    pytest.importorskip("curvlinops", reason=REASON)
    main()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 + len(PEERS) * len(MODELS)
