//! Invoke.

use std::collections::BTreeMap;

use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use medes_controller::InvokeOptions;
use medes_core::FunctionName;
use medes_node::NodeApi;
use tokio::time::Instant;

use super::Api;
use super::REQUEST_ID;
use super::error::LambdaError;
use super::log_tail::LogTail;
use super::name::{LATEST, parse};
use crate::body::{self, BodyError};

/// Lambda's limit for the payload of an asynchronous request, bytes.
const MAX_EVENT_PAYLOAD: usize = 1 << 20;

pub(super) async fn invoke<N: NodeApi>(
    State(api): State<Api<N>>,
    Path(name): Path<String>,
    Query(query): Query<BTreeMap<String, String>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, LambdaError> {
    let name = parse(&name, query.get("Qualifier").map(String::as_str))?;
    let limit = api.controller.config().max_payload;
    let payload = body::read(body, limit).await.map_err(|e| match e {
        BodyError::TooLong => LambdaError::payload_too_large(limit),
        BodyError::Broken(why) => LambdaError::request_content(why),
    })?;
    if api.controller.deployed(&name).is_none() {
        return Err(LambdaError::not_found(name.as_str()));
    }
    let options = InvokeOptions {
        received: Instant::now(),
        client_context: client_context(&headers)?,
        trace: header(&headers, "x-amzn-trace-id").map(str::to_owned),
        ..InvokeOptions::default()
    };
    let payload = checked(payload)?;
    match header(&headers, "x-amz-invocation-type").unwrap_or("RequestResponse") {
        "RequestResponse" => {
            let tail = header(&headers, "x-amz-log-type") == Some("Tail");
            synchronous(&api, &name, payload, options, tail).await
        }
        "Event" => asynchronous(&api, name, payload, options),
        "DryRun" => Ok(StatusCode::NO_CONTENT.into_response()),
        other => Err(LambdaError::validation(
            other,
            "invocationType",
            "Member must satisfy enum value set: [RequestResponse, Event, DryRun]",
        )),
    }
}

async fn synchronous<N: NodeApi>(
    api: &Api<N>,
    name: &FunctionName,
    payload: Bytes,
    options: InvokeOptions,
    tail: bool,
) -> Result<Response, LambdaError> {
    let controller = &api.controller;
    let max_payload = controller.config().max_payload;
    let tail = match controller.deployed(name) {
        Some(deployed) if tail => Some(LogTail::begin(controller.node(), deployed).await),
        _ => None,
    };
    let result = controller
        .invoke(name, payload, options)
        .await
        .map_err(|e| LambdaError::from_invoke(&e, name, max_payload))?;
    let mut headers = HeaderMap::new();
    let mut set = |name: &'static str, value: &str| {
        if let Ok(value) = HeaderValue::try_from(value) {
            headers.insert(HeaderName::from_static(name), value);
        }
    };
    set("content-type", "application/json");
    set("x-amz-executed-version", LATEST);
    set(REQUEST_ID, &result.request.to_string());
    if result.error.is_some() {
        set("x-amz-function-error", "Unhandled");
    }
    if let Some(tail) = tail {
        let text = tail.end(controller.node(), &result).await;
        set("x-amz-log-result", &STANDARD.encode(text));
    }
    Ok((StatusCode::OK, headers, result.payload).into_response())
}

/// Accepts a request whose result nobody waits for. It is tried once.
fn asynchronous<N: NodeApi>(
    api: &Api<N>,
    name: FunctionName,
    payload: Bytes,
    options: InvokeOptions,
) -> Result<Response, LambdaError> {
    if payload.len() > MAX_EVENT_PAYLOAD {
        let message = format!(
            "{} byte payload is too large for the Event invocation type (limit \
             {MAX_EVENT_PAYLOAD} bytes)",
            payload.len()
        );
        return Err(LambdaError::too_large("RequestTooLargeException", message));
    }
    let place = api.events.clone().try_acquire_owned().map_err(|_| {
        LambdaError::throttled("Rate Exceeded. Too many asynchronous requests wait")
    })?;
    let request = options.request.to_string();
    let controller = api.controller.clone();
    tokio::spawn(async move {
        let _place = place;
        let request = options.request;
        match controller.invoke(&name, payload, options).await {
            Ok(result) if result.error.is_none() => {}
            Ok(result) => {
                tracing::warn!(function = %name, %request, error = ?result.error, "event failed");
            }
            Err(e) => tracing::warn!(function = %name, %request, error = %e, "event lost"),
        }
    });
    let mut response = StatusCode::ACCEPTED.into_response();
    if let Ok(value) = HeaderValue::try_from(request) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    Ok(response)
}

/// An absent payload is an empty object; one that is not JSON is refused.
fn checked(payload: Bytes) -> Result<Bytes, LambdaError> {
    if payload.is_empty() {
        return Ok(Bytes::from_static(b"{}"));
    }
    let failed = |e: &dyn std::fmt::Display| {
        LambdaError::request_content(format!(
            "Could not parse request body into json: Could not parse payload into json: {e}"
        ))
    };
    std::str::from_utf8(&payload).map_err(|e| failed(&e))?;
    serde_json::from_slice::<serde::de::IgnoredAny>(&payload).map_err(|e| failed(&e))?;
    Ok(payload)
}

fn client_context(headers: &HeaderMap) -> Result<Option<String>, LambdaError> {
    let Some(text) = header(headers, "x-amz-client-context") else { return Ok(None) };
    let decoded = STANDARD.decode(text).ok().and_then(|b| String::from_utf8(b).ok());
    decoded
        .filter(|json| serde_json::from_str::<serde::de::IgnoredAny>(json).is_ok())
        .map(Some)
        .ok_or_else(|| {
            LambdaError::request_content(
                "Client context must be a valid Base64-encoded JSON object.",
            )
        })
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}
