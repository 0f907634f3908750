"""The rows of walked families agree with themselves and with gguf's own tensor names."""

import gguf
import pytest

from bitladder.formats.families import FAMILIES, family_of
from bitladder.formats.families.family import Family, Layers
from bitladder.formats.roles import layer_tensor

WALKED = [
    pytest.param(row, layers, id=layers.model_type)
    for row in FAMILIES.values()
    for layers in (row.layers, row.expert_layers)
    if layers
]


def roles_of(layers: Layers) -> list[str]:
    return [role for parameter in layers.parameters for role in parameter.roles]


@pytest.mark.parametrize(("row", "layers"), WALKED)
def test_each_role_makes_one_parameter(row: Family, layers: Layers):
    roles = roles_of(layers)
    paths = [parameter.path for parameter in layers.parameters]
    assert len(roles) == len(set(roles))
    assert len(paths) == len(set(paths))


@pytest.mark.parametrize(("row", "layers"), WALKED)
def test_each_linear_layer_reads_one_shared_input(row: Family, layers: Layers):
    for kind in layers.kinds:
        read = [role for shared in kind.inputs for role in shared.roles]
        linear = {
            role
            for parameter in kind.parameters
            for role in parameter.roles
            if role.endswith(".weight") and "norm" not in role
        }
        assert len(read) == len(set(read))
        assert set(read) == linear


@pytest.mark.parametrize(("row", "layers"), WALKED)
def test_modules_and_absorbing_tensors_exist(row: Family, layers: Layers):
    for kind in layers.kinds:
        paths = [parameter.path for parameter in kind.parameters]
        roles = [role for parameter in kind.parameters for role in parameter.roles]
        for shared in kind.inputs:
            assert any(path.startswith(shared.module + ".") for path in paths)
            assert shared.absorbs is None or shared.absorbs in roles


@pytest.mark.parametrize(("row", "layers"), WALKED)
def test_passes_stop_where_a_linear_layer_reads_its_own_input(row: Family, layers: Layers):
    """Else what is kept would be the input of something else, too, or never be asked for."""
    for kind in layers.kinds:
        alone = {shared.module for shared in kind.inputs if shared.kind == "linear" and len(shared.roles) == 1}
        assert {stop.module for stop in kind.stops} <= alone
        assert all(stop.module.startswith(stop.owner + ".") for stop in kind.stops)


@pytest.mark.parametrize(("row", "layers"), WALKED)
def test_roles_are_gguf_names(row: Family, layers: Layers):
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == row.architecture)
    known = {gguf.TENSOR_NAMES[tensor].format(bid=0) for tensor in gguf.MODEL_TENSORS[arch]}
    for role in roles_of(layers):
        assert layer_tensor(0, role).rsplit(".", 1)[0] in known


@pytest.mark.parametrize(("row", "layers"), WALKED)
def test_names_on_disk_are_of_parameters(row: Family, layers: Layers):
    paths = {parameter.path for parameter in layers.parameters}
    assert {*layers.experts, *layers.renamed} <= paths
    assert {path for path in paths if path.startswith("mlp.experts.")} == set(layers.experts)
    assert bool(layers.experts) == bool(layers.routers)


def test_mixtral_is_llama_with_experts():
    row = family_of("llama")
    assert row.layers_of(0) is row.layers
    assert row.layers_of(8) is row.expert_layers
    assert row.expert_layers.model_type == "mixtral"
    assert family_of("mamba").layers_of(0) is None
