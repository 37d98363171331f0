"""Does with an unmodified boto3 what its users do; any difference from AWS ends it with an error.

lambda_client.py MEDES URL RUNTIME
"""

import base64
import io
import json
import subprocess
import sys
import zipfile

import boto3
from botocore.exceptions import ClientError, ParamValidationError

medes, url, runtime = sys.argv[1:]
client = boto3.client(
    "lambda", endpoint_url=url, region_name="us-east-1",
    aws_access_key_id="any", aws_secret_access_key="any",
)

CODE = """
import json, os
print("imported")
calls = 0
state = bytearray(os.urandom(1 << 20))

def handler(event, context):
    global calls
    calls += 1
    print("this is call", calls)
    if event.get("fail"):
        raise KeyError("an unknown door")
    return {"calls": calls, "greeting": os.environ["GREETING"] + " " + event["name"],
            "memory": context.memory_limit_in_mb, "state": hash(bytes(state)),
            "custom": context.client_context and context.client_context.custom}
"""


def archive(code):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("app.py", code)
    return buffer.getvalue()


def invoke(payload, **more):
    answer = client.invoke(FunctionName="greeter", Payload=json.dumps(payload), **more)
    assert answer["ResponseMetadata"]["HTTPStatusCode"] == 200 == answer["StatusCode"], answer
    return json.loads(answer["Payload"].read()), answer


def start_of(answer):
    return answer["ResponseMetadata"]["HTTPHeaders"].get("x-medes-start")


def refused(error, call, **arguments):
    try:
        call(**arguments)
    except error as refusal:
        return refusal
    raise AssertionError(f"{call.__name__} was not refused with {error.__name__}")


created = client.create_function(
    FunctionName="greeter", Runtime=runtime, Handler="app.handler", Role="arn:aws:iam::000000000000:role/any",
    Code={"ZipFile": archive(CODE)}, Timeout=10, MemorySize=128,
    Environment={"Variables": {"GREETING": "hello"}},
)
assert created["FunctionArn"].endswith(":function:greeter"), created
client.get_waiter("function_active_v2").wait(FunctionName="greeter")
refused(client.exceptions.ResourceConflictException, client.create_function,
        FunctionName="greeter", Runtime=runtime, Handler="app.handler",
        Role="arn:aws:iam::000000000000:role/any", Code={"ZipFile": archive(CODE)})

first, _ = invoke({"name": "world"})
assert (first["calls"], first["greeting"], int(first["memory"])) == (1, "hello world", 128), first
second, _ = invoke({"name": "there"})
assert (second["calls"], second["state"]) == (2, first["state"]), second

# From the dedup state it is the same process, with the same memory.
for calls in range(3, 8):
    done = subprocess.run([medes, "--url", url, "dedup", "greeter"], capture_output=True, text=True)
    assert done.returncode == 0, done
    answer, _ = invoke({"name": "again"})
    assert (answer["calls"], answer["state"]) == (calls, first["state"]), answer
counts = json.loads(subprocess.run([medes, "--url", url, "functions", "--json"], capture_output=True).stdout)
assert counts["functions"][0]["counts"]["dedup"] == 5, counts

context = base64.b64encode(json.dumps({"custom": {"k": "v"}}).encode()).decode()
answer, whole = invoke({"name": "log"}, LogType="Tail", ClientContext=context)
assert answer["custom"] == {"k": "v"}, answer
log = base64.b64decode(whole["LogResult"]).decode()
assert "this is call 8" in log and "this is call 7" not in log and "REPORT RequestId:" in log, log

error, whole = invoke({"fail": True})
assert whole["FunctionError"] == "Unhandled", whole
assert (error["errorType"], error["errorMessage"]) == ("KeyError", "'an unknown door'"), error
assert "app.py" in error["stackTrace"][-1], error

assert client.invoke(FunctionName="greeter", InvocationType="DryRun")["StatusCode"] == 204
assert client.invoke(FunctionName="greeter", InvocationType="Event", Payload=b'{"name": "x"}')["StatusCode"] == 202

got = client.get_function(FunctionName="greeter")["Configuration"]
assert (got["State"], got["Runtime"], got["CodeSha256"]) == ("Active", runtime, created["CodeSha256"]), got
names = [f["FunctionName"] for page in client.get_paginator("list_functions").paginate() for f in page["Functions"]]
assert names == ["greeter"], names

updated = client.update_function_code(FunctionName="greeter", ZipFile=archive(CODE.replace("calls += 1", "calls += 100")))
assert updated["CodeSha256"] != created["CodeSha256"], updated
client.get_waiter("function_updated_v2").wait(FunctionName="greeter")
assert invoke({"name": "new"})[0]["calls"] == 100
client.update_function_configuration(FunctionName="greeter", Environment={"Variables": {"GREETING": "bye"}})
client.get_waiter("function_updated_v2").wait(FunctionName="greeter")
assert invoke({"name": "world"})[0]["greeting"] == "bye world"

refused(client.exceptions.InvalidParameterValueException, client.create_function,
        FunctionName="broken", Runtime=runtime, Handler="app.handler",
        Role="arn:aws:iam::000000000000:role/any", Code={"ZipFile": b"no archive at all"})
unknown = refused(client.exceptions.ResourceNotFoundException, client.invoke, FunctionName="nobody")
assert unknown.response["ResponseMetadata"]["HTTPStatusCode"] == 404, unknown.response
refused(client.exceptions.ResourceNotFoundException, client.get_function, FunctionName="nobody")
refused(client.exceptions.RequestTooLargeException, client.invoke,
        FunctionName="greeter", Payload=b'"' + b"x" * (6 << 20) + b'"')
refused((ClientError, ParamValidationError), client.invoke, FunctionName="no name")

client.delete_function(FunctionName="greeter")
refused(client.exceptions.ResourceNotFoundException, client.invoke, FunctionName="greeter")
print("all as expected")
