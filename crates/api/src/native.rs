//! The native API, version 1.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Json, Router};
use base64::Engine as _;
use futures_util::stream;
use medes_controller::{
    CodeSource, Controller, Deploy, DeployMode, HandError, InvokeOptions, error_type,
};
use medes_core::{FunctionName, InvocationResult, Layout, SandboxId, Tenant};
use medes_node::NodeApi;
use medes_policy::FunctionSettings;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::body::BodyError;
use crate::error::ApiError;

/// How often a followed log is looked at.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(200);

/// What is shown of a log if nothing else is asked for, bytes.
const LOG_BYTES: usize = 64 << 10;

/// The most that is shown of a log at once, bytes.
const MOST_LOG_BYTES: usize = 16 << 20;

type Answer = Result<Response, ApiError>;
type QueryOf<T> = Result<Query<T>, QueryRejection>;

pub(crate) fn routes<N: NodeApi>() -> Router<Controller<N>> {
    Router::new()
        .route("/v1/health", get(health::<N>))
        .route("/v1/info", get(info::<N>))
        .route("/v1/shutdown", post(shutdown::<N>))
        .route("/v1/functions", get(functions::<N>))
        .route("/v1/functions/{name}", put(deploy::<N>).get(function::<N>).delete(remove::<N>))
        .route("/v1/functions/{name}/invoke", post(invoke::<N>))
        .route("/v1/functions/{name}/start", post(start::<N>))
        .route("/v1/functions/{name}/logs", get(logs::<N>))
        .route("/v1/functions/{name}/dedup", post(dedup_function::<N>))
        .route("/v1/functions/{name}/restore", post(restore_function::<N>))
        .route("/v1/functions/{name}/purge", post(purge_function::<N>))
        .route("/v1/functions/{name}/policy", crate::policy::of_one::<N>())
        .route("/v1/policy", crate::policy::of_all::<N>())
        .route("/v1/tenants", get(tenants::<N>))
        .route("/v1/sandboxes", get(sandboxes::<N>))
        .route("/v1/sandboxes/{id}", axum::routing::delete(purge::<N>))
        .route("/v1/sandboxes/{id}/dedup", post(dedup::<N>))
        .route("/v1/sandboxes/{id}/restore", post(restore::<N>))
}

/// What there is, as an answer to who asks for something else.
pub(crate) fn no_such_route(method: &Method, path: &str) -> Response {
    let message = format!(
        "there is no {method} {path}; there are GET /v1/health, /v1/info, /v1/functions, \
         /v1/functions/NAME/logs, /v1/tenants and /v1/sandboxes, GET, PUT and DELETE /v1/policy \
         and /v1/functions/NAME/policy, GET, PUT and DELETE /v1/functions/NAME, POST \
         /v1/functions/NAME/invoke, start, dedup, restore and purge, POST /v1/sandboxes/ID/dedup \
         and restore, DELETE /v1/sandboxes/ID, GET and POST /v1/attached, \
         POST /v1/attached/ID/restore, POST /v1/shutdown, and AWS Lambda's operations below \
         /2015-03-31/functions"
    );
    ApiError::new(StatusCode::NOT_FOUND, "NoSuchRoute", message).into_response()
}

async fn health<N: NodeApi>(State(controller): State<Controller<N>>) -> Response {
    let version = env!("CARGO_PKG_VERSION");
    let uptime_ms = controller.uptime_ms();
    Json(json!({ "status": "ok", "version": version, "uptime_ms": uptime_ms })).into_response()
}

async fn info<N: NodeApi>(State(controller): State<Controller<N>>) -> Response {
    let info = controller.info();
    Json(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "node": { "memory": info.memory, "runtimes": info.runtimes },
        "config": info.config,
        "functions": info.functions,
        "sandboxes": info.sandboxes,
        "uptime_ms": info.uptime_ms,
    }))
    .into_response()
}

async fn shutdown<N: NodeApi>(State(controller): State<Controller<N>>) -> StatusCode {
    controller.request_shutdown();
    StatusCode::ACCEPTED
}

async fn functions<N: NodeApi>(State(controller): State<Controller<N>>) -> Response {
    Json(json!({ "functions": controller.functions() })).into_response()
}

async fn function<N: NodeApi>(
    State(controller): State<Controller<N>>,
    Path(name): Path<String>,
) -> Answer {
    let name = function_name(&name)?;
    let view = controller.function(&name).ok_or(HandError::NoSuchFunction(name))?;
    Ok(Json(view).into_response())
}

/// The body of a deployment.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DeployBody {
    runtime: String,
    handler: String,
    code: CodeBody,
    #[serde(default)]
    layers: Vec<PathBuf>,
    #[serde(default)]
    environment: BTreeMap<String, String>,
    memory_mib: Option<u32>,
    timeout_ms: Option<u64>,
    max_sandboxes: Option<u32>,
    #[serde(default)]
    layout: Layout,
    #[serde(default)]
    tenant: Tenant,
    #[serde(default)]
    description: String,
    policy: Option<serde_json::Map<String, Value>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum CodeBody {
    Directory(PathBuf),
    Zip(String),
}

/// The longest body of a deployment, bytes: Base64 takes four bytes for three of the archive, the
/// settings take some more.
pub(crate) fn deploy_limit(max_code: u64) -> usize {
    (max_code as usize).saturating_mul(4) / 3 + (1 << 20)
}

async fn deploy<N: NodeApi>(
    State(controller): State<Controller<N>>,
    Path(name): Path<String>,
    request: Request,
) -> Answer {
    let name = function_name(&name)?;
    let limit = deploy_limit(controller.config().max_code);
    let body: DeployBody = json_body(request, limit).await?;
    let code = match body.code {
        CodeBody::Directory(path) => CodeSource::Directory(absolute("code.directory", path)?),
        CodeBody::Zip(text) => {
            let zip = base64::engine::general_purpose::STANDARD.decode(text);
            CodeSource::Zip(zip.map_err(|e| ApiError::bad_request(format!("code.zip: {e}")))?)
        }
    };
    let mut deploy = Deploy::new(name.clone(), &body.runtime, &body.handler, code);
    deploy.layers =
        body.layers.into_iter().map(|l| absolute("layers", l)).collect::<Result<_, _>>()?;
    deploy.environment = body.environment;
    deploy.memory_mib = body.memory_mib.unwrap_or(deploy.memory_mib);
    deploy.timeout_ms = body.timeout_ms.unwrap_or(deploy.timeout_ms);
    deploy.max_sandboxes = body.max_sandboxes.unwrap_or(deploy.max_sandboxes);
    deploy.layout = body.layout;
    deploy.tenant = body.tenant;
    deploy.description = body.description;
    let own = |change| crate::policy::changed(&FunctionSettings::default(), change);
    deploy.settings = body.policy.map(own).transpose()?;
    controller.deploy(deploy, DeployMode::Replace).await?;
    let view = controller.function(&name).ok_or(HandError::NoSuchFunction(name))?;
    Ok(Json(view).into_response())
}

/// A path of the client's, which can't mean the platform's own working directory.
fn absolute(field: &str, path: PathBuf) -> Result<PathBuf, ApiError> {
    if path.is_absolute() {
        return Ok(path);
    }
    let message = format!("{field}: {} is not an absolute path", path.display());
    Err(ApiError::bad_request(message))
}

async fn remove<N: NodeApi>(
    State(controller): State<Controller<N>>,
    Path(name): Path<String>,
) -> Answer {
    controller.remove(&function_name(&name)?).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

async fn invoke<N: NodeApi>(
    State(controller): State<Controller<N>>,
    Path(name): Path<String>,
    request: Request,
) -> Answer {
    let name = function_name(&name)?;
    let limit = controller.config().max_payload;
    let payload = body(request, limit).await?;
    // Its time counts from here: how fast a client sends is not the platform's doing.
    let options = InvokeOptions::default();
    let result = controller.invoke(&name, payload, options).await?;
    Ok(answer(result))
}

/// A function's answer, with what is known of its way in headers.
fn answer(result: InvocationResult) -> Response {
    let mut headers = HeaderMap::new();
    let mut set = |name: &'static str, value: String| {
        if let Ok(value) = HeaderValue::try_from(value) {
            headers.insert(name, value);
        }
    };
    set("content-type", "application/json".to_owned());
    set("x-medes-request", result.request.to_string());
    if let Some(sandbox) = result.sandbox {
        set("x-medes-sandbox", sandbox.to_string());
    }
    set("x-medes-start", result.start.to_string());
    set("x-medes-queue-us", result.timing.queue_us.to_string());
    set("x-medes-startup-us", result.timing.startup_us.to_string());
    set("x-medes-execution-us", result.timing.execution_us.to_string());
    set("x-medes-total-us", result.timing.total_us.to_string());
    if let Some(memory) = &result.memory {
        set("x-medes-prefetch-us", memory.prefetch_us.to_string());
        set("x-medes-thaw-us", memory.thaw_us.to_string());
        set("x-medes-pages-before", memory.pages_before.to_string());
        set("x-medes-pages-on-demand", memory.pages_on_demand.to_string());
        set("x-medes-faults", memory.faults.to_string());
    }
    if let Some(error) = &result.error {
        let own = serde_json::from_slice::<Value>(&result.payload).ok();
        let own = own.as_ref().and_then(|document| document["errorType"].as_str());
        let kind = own.filter(|k| k.bytes().all(|b| (32..127).contains(&b)));
        set("x-medes-error", kind.unwrap_or_else(|| error_type(error)).to_owned());
    }
    (headers, result.payload).into_response()
}

#[derive(Deserialize)]
struct LogQuery {
    bytes: Option<usize>,
    #[serde(default)]
    follow: bool,
}

async fn logs<N: NodeApi>(
    State(controller): State<Controller<N>>,
    Path(name): Path<String>,
    query: QueryOf<LogQuery>,
) -> Answer {
    let query = query_of(query)?;
    let name = function_name(&name)?;
    let deployed =
        controller.deployed(&name).ok_or_else(|| HandError::NoSuchFunction(name.clone()))?;
    let bytes = query.bytes.unwrap_or(LOG_BYTES).min(MOST_LOG_BYTES);
    let (text, position) = controller.node().logs_tail(&deployed.spec, bytes).await;
    let plain = [(header::CONTENT_TYPE, "text/plain; charset=utf-8")];
    if !query.follow {
        return Ok((plain, text).into_response());
    }
    let first = Some(text).filter(|t| !t.is_empty());
    // Ends with the function, the platform, or the client's patience.
    let lines = stream::unfold((first, position), move |(first, mut position)| {
        let (controller, name) = (controller.clone(), name.clone());
        async move {
            if let Some(text) = first {
                return Some((Ok::<_, std::convert::Infallible>(text), (None, position)));
            }
            loop {
                let deployed = controller.deployed(&name)?;
                let (text, next) = controller.node().logs_after(&deployed.spec, position).await;
                position = next;
                if !text.is_empty() {
                    return Some((Ok(text), (None, position)));
                }
                tokio::select! {
                    () = tokio::time::sleep(FOLLOW_INTERVAL) => {}
                    () = controller.shutdown_requested() => return None,
                }
            }
        }
    });
    Ok((plain, Body::from_stream(lines)).into_response())
}

async fn tenants<N: NodeApi>(State(controller): State<Controller<N>>) -> Response {
    Json(json!({ "tenants": controller.tenants() })).into_response()
}

async fn sandboxes<N: NodeApi>(State(controller): State<Controller<N>>) -> Response {
    Json(json!({ "sandboxes": controller.sandboxes() })).into_response()
}

#[derive(Deserialize)]
struct DedupQuery {
    #[serde(default)]
    base: bool,
}

async fn dedup<N: NodeApi>(
    State(controller): State<Controller<N>>,
    Path(id): Path<String>,
    query: QueryOf<DedupQuery>,
) -> Answer {
    let query = query_of(query)?;
    let id = sandbox_id(&id)?;
    let report = controller.dedup(id, query.base).await?;
    Ok(Json(json!({ "sandbox": id.to_string(), "report": report })).into_response())
}

async fn restore<N: NodeApi>(
    State(controller): State<Controller<N>>,
    Path(id): Path<String>,
) -> Answer {
    let id = sandbox_id(&id)?;
    let report = controller.restore(id).await?;
    Ok(Json(json!({ "sandbox": id.to_string(), "report": report })).into_response())
}

async fn purge<N: NodeApi>(
    State(controller): State<Controller<N>>,
    Path(id): Path<String>,
) -> Answer {
    controller.purge(sandbox_id(&id)?).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

async fn start<N: NodeApi>(
    State(controller): State<Controller<N>>,
    Path(name): Path<String>,
) -> Answer {
    let id = controller.start(&function_name(&name)?).await?;
    Ok(Json(json!({ "sandbox": id.to_string() })).into_response())
}

async fn dedup_function<N: NodeApi>(
    State(controller): State<Controller<N>>,
    Path(name): Path<String>,
) -> Answer {
    Ok(results(controller.dedup_function(&function_name(&name)?).await?))
}

async fn restore_function<N: NodeApi>(
    State(controller): State<Controller<N>>,
    Path(name): Path<String>,
) -> Answer {
    Ok(results(controller.restore_function(&function_name(&name)?).await?))
}

async fn purge_function<N: NodeApi>(
    State(controller): State<Controller<N>>,
    Path(name): Path<String>,
) -> Answer {
    Ok(results(controller.purge_function(&function_name(&name)?).await?))
}

fn results<T: serde::Serialize>(all: Vec<(SandboxId, Result<T, HandError>)>) -> Response {
    let one = |(id, result): (SandboxId, Result<T, HandError>)| match result {
        Ok(report) => json!({ "sandbox": id.to_string(), "report": report, "error": null }),
        Err(error) => {
            let error = ApiError::from(error).body();
            json!({ "sandbox": id.to_string(), "report": null, "error": error })
        }
    };
    Json(json!({ "results": all.into_iter().map(one).collect::<Vec<_>>() })).into_response()
}

fn query_of<T>(query: QueryOf<T>) -> Result<T, ApiError> {
    query.map(|Query(query)| query).map_err(|e| ApiError::bad_request(e.body_text()))
}

pub(crate) fn function_name(text: &str) -> Result<FunctionName, ApiError> {
    text.parse().map_err(ApiError::bad_request)
}

fn sandbox_id(text: &str) -> Result<SandboxId, ApiError> {
    text.parse().map_err(|e| ApiError::bad_request(format!("sandbox {text:?}: {e}")))
}

/// The body of a request, if it is not longer than `limit`.
async fn body(request: Request, limit: usize) -> Result<Bytes, ApiError> {
    crate::body::read(request.into_body(), limit).await.map_err(|error| match error {
        BodyError::TooLong => {
            let message = format!("the body is longer than the {limit} bytes that are allowed");
            ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "PayloadTooLarge", message)
        }
        BodyError::Broken(why) => ApiError::bad_request(format!("the body: {why}")),
    })
}

pub(crate) async fn json_body<T: DeserializeOwned>(
    request: Request,
    limit: usize,
) -> Result<T, ApiError> {
    let bytes = body(request, limit).await?;
    serde_json::from_slice(&bytes).map_err(|e| ApiError::bad_request(format!("the body: {e}")))
}
