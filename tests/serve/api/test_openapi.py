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

from support.jobs import client_of, training, until, upload
from support.server import AS_ADMIN

CHECKS = [
    not_a_server_error,
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
]


@pytest.mark.parametrize("most", [3, pytest.param(6, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_nothing_that_the_schema_allows_or_forbids_breaks_the_server(
    two, adapter_dirs, tmp_path, mode, most
):
    with training(tmp_path / "runs", adapters=two, loading_root=adapter_dirs) as server:
        client = client_of(server)
        file = upload(client).id
        job = client.fine_tuning.jobs.create(model="tiny", training_file=file).id
        until(client, job, "succeeded")
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        operations = [result.ok() for result in schema.get_all_operations()]
        assert len(operations) >= 27
        for operation in operations:
            if mode is GenerationMode.NEGATIVE and not list(operation.body):
                continue  # takes nothing that could be wrong
            try_out(
                operation, mode, most, {"file_id": file, "fine_tuning_job_id": job, "job_id": job}
            )


def try_out(operation, mode, most, ids):
    is_plain = "{" in operation.path and not list(operation.body)  # of an id alone

    @settings(
        max_examples=most // 2 if is_plain else most,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case):
        for name in case.path_parameters:
            if name in ids and len(str(case.path_parameters[name])) % 2:
                case.path_parameters[name] = ids[name]
        headers = (
            AS_ADMIN
            if any(x in case.path for x in ("lora", "files", "tuning", "rows", "plan", "jobs"))
            else {}
        )
        case.call_and_validate(headers=headers, checks=CHECKS, timeout=20)

    check()
