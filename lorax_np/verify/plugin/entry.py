"""What pytest loads at every start: options, one fixture, and nothing heavy before a subject is named.

It stands beside the package, since importing anything within lorax_np imports NumPy first. The work is done in
lorax_np.verify.plugin.plugin, which is loaded when --lorax-np-subject is given, or a test asks for a case.
"""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Every option begins --lorax-np-."""
    group = parser.getgroup("lorax-np", "lorax_np: judge an implementation of a LoRA layer")
    for name, metavar, text in (
        (
            "subject",
            "MODULE:ATTRIBUTE",
            "judge this, one test for each check: pytest --pyargs lorax_np.verify ...",
        ),
        ("profile", "PROFILE", "what the subject computes in (default: fp32)"),
        ("level", "LEVEL", "full, or quick for a third of the layers (default: full)"),
        ("case", "ID", "only the checks whose id begins with these path segments, such as exact/dora"),
        ("xfails", "FILE", "ids of checks that are known to fail, one a line; one that passes fails"),
        ("report", "FILE", "write the report there as JSON"),
    ):
        default = {"profile": "fp32", "level": "full"}.get(name)
        group.addoption(f"--lorax-np-{name}", metavar=metavar, default=default, help=text)


def pytest_configure(config: pytest.Config) -> None:
    """Load the judge where there is something to judge."""
    if config.getoption("lorax_np_subject"):
        from lorax_np.verify.plugin.plugin import Conformance

        config.pluginmanager.register(Conformance(config), "lorax_np_conformance")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each kind of layer, where a test asks for lorax_np_case."""
    if "lorax_np_case" in metafunc.fixturenames:
        from lorax_np.verify.plugin.plugin import case_ids

        metafunc.parametrize("lorax_np_case", case_ids(metafunc.config), indirect=True)


@pytest.fixture
def lorax_np_case(request: pytest.FixtureRequest) -> object:
    """Return a layer to compute, a lorax_np.verify.Case of its own; lx.verify.assert_case judges the answer."""
    from lorax_np.verify.plugin.plugin import case_of

    return case_of(request.config, request.param)
