"""The server against its own OpenAPI, with requests that schemathesis makes up."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from support.server import ADMIN, AS_ADMIN, running, scripted
from veneer.serve.config import Keys

CHECKS = [
    not_a_server_error,
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
]


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_nothing_that_the_schema_allows_or_forbids_breaks_the_server(two, adapter_dirs, mode):
    keys = Keys(admin=ADMIN)
    with running(scripted(two), keys=keys, loading_root=adapter_dirs) as server:
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        operations = [result.ok() for result in schema.get_all_operations()]
        assert len(operations) >= 12
        for operation in operations:
            if mode is GenerationMode.NEGATIVE and operation.method.upper() == "GET":
                continue  # takes nothing that could be wrong
            try_out(operation, mode)


def try_out(operation, mode):
    @settings(max_examples=10, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case):
        headers = AS_ADMIN if "lora" in case.path else {}
        case.call_and_validate(headers=headers, checks=CHECKS, timeout=20)

    check()
