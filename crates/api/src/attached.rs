//! The part of the native API that puts processes into the dedup state that the platform has not
//! started. It is there only if the operator wants it: it works on any process of the host.

use axum::body::Bytes;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use medes_attach::protocol::{Dedup, Which};
use medes_attach::{Client, ClientError, Target};
use serde::Deserialize;
use serde_json::json;
use std::path::PathBuf;

use crate::error::ApiError;

type Answer = Result<Response, ApiError>;

/// A client of the process that holds attached memory, if attaching is allowed.
type Attach = Option<Client>;

pub(crate) fn routes(attach: Attach) -> Router {
    Router::new()
        .route("/v1/attached", get(status).post(dedup))
        .route("/v1/attached/events", get(events))
        .route("/v1/attached/{id}/restore", post(restore))
        .with_state(attach)
}

/// What is to be attached: one of the first three.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Body {
    pid: Option<i32>,
    cgroup: Option<PathBuf>,
    container: Option<String>,
    domain: Option<String>,
    #[serde(default)]
    base: bool,
    #[serde(default)]
    dry_run: bool,
}

#[derive(Deserialize)]
struct Wait {
    #[serde(default)]
    wait: bool,
}

async fn status(State(attach): State<Attach>) -> Answer {
    let attached = ask(attach, Client::status).await?;
    Ok(Json(json!({ "attached": attached })).into_response())
}

async fn events(State(attach): State<Attach>) -> Answer {
    let events = ask(attach, Client::events).await?;
    Ok(Json(json!({ "events": events })).into_response())
}

async fn dedup(State(attach): State<Attach>, body: Bytes) -> Answer {
    let body: Body = serde_json::from_slice(&body).map_err(ApiError::bad_request)?;
    let Body { pid, cgroup, container, domain, base, dry_run } = body;
    let target = match (pid, cgroup, container) {
        (Some(pid), None, None) => Target::Pid(pid),
        (None, Some(path), None) => Target::Cgroup(path),
        (None, None, Some(id)) => Target::Container(id),
        _ => return Err(ApiError::bad_request("one of pid, cgroup and container is needed")),
    };
    let dedup = Dedup { target, domain, base, dry_run };
    let report = ask(attach, move |client| client.dedup(dedup)).await?;
    Ok(Json(json!({ "report": report })).into_response())
}

async fn restore(
    State(attach): State<Attach>,
    Path(id): Path<String>,
    Query(Wait { wait }): Query<Wait>,
) -> Answer {
    let which = if id == "all" { Which::All } else { Which::Id(id) };
    let restored = ask(attach, move |client| client.restore(which, wait)).await?;
    Ok(Json(json!({ "restored": restored })).into_response())
}

/// Asks where it may block.
async fn ask<T: Send + 'static>(
    attach: Attach,
    question: impl FnOnce(&Client) -> Result<T, ClientError> + Send + 'static,
) -> Result<T, ApiError> {
    let client = attach.ok_or_else(|| {
        let message = "attaching works on any process of this host, and whoever reaches this \
                       address may ask for it: [api] attach = true in the configuration allows \
                       that; `medes attach` works without";
        ApiError::new(StatusCode::FORBIDDEN, "AttachNotAllowed", message)
    })?;
    let answer = tokio::task::spawn_blocking(move || question(&client)).await;
    answer
        .map_err(|e| ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "Internal", e))?
        .map_err(Into::into)
}

impl From<ClientError> for ApiError {
    fn from(error: ClientError) -> Self {
        let (status, code) = match error.code() {
            "NoSuchTarget" => (StatusCode::NOT_FOUND, "NoSuchTarget"),
            "NotAttached" => (StatusCode::NOT_FOUND, "NotAttached"),
            "Untouchable" => (StatusCode::FORBIDDEN, "Untouchable"),
            "StaysWarm" => (StatusCode::CONFLICT, "StaysWarm"),
            "Paused" => (StatusCode::CONFLICT, "Paused"),
            "Attached" => (StatusCode::CONFLICT, "Attached"),
            "Busy" => (StatusCode::CONFLICT, "Busy"),
            "Lost" => (StatusCode::CONFLICT, "Lost"),
            _ => (StatusCode::INTERNAL_SERVER_ERROR, "Attach"),
        };
        Self::new(status, code, error)
    }
}
