//! The command line's side of the admin API.

use super::api::ApiError;
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::path::PathBuf;
use xsan_env::Env;
use xsan_env::net::Stream;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// Nobody listens there.
    #[error("cannot reach the cluster at {path}: {source}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It answered with an error.
    #[error("{}", .0.message)]
    Refused(ApiError),
    /// It broke off or speaks something else.
    #[error("the cluster's answer cannot be read: {0}")]
    Answer(String),
}

/// One cluster's admin socket.
#[derive(Clone, Debug)]
pub struct Client {
    env: Env,
    socket: PathBuf,
}

impl Client {
    /// Talks to `socket`.
    #[must_use]
    pub fn new(env: Env, socket: PathBuf) -> Self {
        Self { env, socket }
    }

    /// One call.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn call<A: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
    ) -> Result<A, ClientError> {
        let unreadable = |error: &dyn std::fmt::Display| ClientError::Answer(error.to_string());
        let stream = Stream::connect_unix(&self.socket)
            .await
            .map_err(|source| ClientError::Connect { path: self.socket.clone(), source })?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|error| unreadable(&error))?;
        drop(self.env.spawn("admin client", async move {
            let _ = connection.await;
        }));
        let body = serde_json::to_vec(body).map_err(|error| unreadable(&error))?;
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "xsan")
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| unreadable(&error))?;
        let answer = sender.send_request(request).await.map_err(|error| unreadable(&error))?;
        let status = answer.status();
        let bytes = answer.into_body().collect().await.map_err(|error| unreadable(&error))?.to_bytes();
        if status.is_success() {
            return serde_json::from_slice(&bytes).map_err(|error| unreadable(&error));
        }
        match serde_json::from_slice::<ApiError>(&bytes) {
            Ok(error) => Err(ClientError::Refused(error)),
            Err(_) => Err(ClientError::Answer(format!("{status}: {}", String::from_utf8_lossy(&bytes)))),
        }
    }

    /// The socket.
    #[must_use]
    pub fn socket(&self) -> &std::path::Path {
        &self.socket
    }
}
