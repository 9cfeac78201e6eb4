//! Certificates of the gateway: STARTTLS through rustls, TLS 1.2 and 1.3 only.
//!
//! NBD has no other way to know a client than its certificate (libvirt offers nothing else), so verification of client
//! certificates is what access control will build on.

use crate::nbd::handshake::TlsMode;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::time_provider::TimeProvider;
use rustls::{RootCertStore, ServerConfig};
use std::sync::Arc;
use std::time::Duration;
use tokio_rustls::TlsAcceptor;
use xsan_env::Env;

/// Why certificates cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// Not PEM, or nothing of the wanted kind in it.
    #[error("no usable {what} in the PEM file")]
    Pem {
        /// `certificate`, `private key` or `client CA certificate`.
        what: &'static str,
        /// What the parser said.
        source: rustls::pki_types::pem::Error,
    },
    /// No certificate in a file that must have one.
    #[error("no {what} in the PEM file")]
    Empty {
        /// As above.
        what: &'static str,
    },
    /// Certificate and key do not belong together, or a kind that is not supported.
    #[error("the certificates are not usable")]
    Refused(#[from] rustls::Error),
    /// The CA certificates cannot verify clients.
    #[error("the client CA is not usable")]
    Verifier(#[from] rustls::server::VerifierBuilderError),
}

impl TlsError {
    /// All are wrong configuration.
    #[must_use]
    pub fn kind(&self) -> xsan_types::ErrorKind {
        xsan_types::ErrorKind::Invalid
    }
}

/// A listener's rule about TLS with what is needed to do it.
#[derive(Clone, Default)]
pub struct Tls {
    pub(crate) mode: TlsMode,
    pub(crate) acceptor: Option<TlsAcceptor>,
}

impl Tls {
    /// No TLS: STARTTLS is refused.
    #[must_use]
    pub fn off() -> Self {
        Self::default()
    }

    /// TLS by `mode` with the certificates of `config` (see [`server_config`]).
    #[must_use]
    pub fn new(mode: TlsMode, config: Arc<ServerConfig>) -> Self {
        let acceptor = (!matches!(mode, TlsMode::Off)).then(|| TlsAcceptor::from(config));
        Self { mode, acceptor }
    }
}

/// The clock for certificate validity: the world's, not the process's.
#[derive(Debug)]
struct Clock(Env);

impl TimeProvider for Clock {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(Duration::from_millis(self.0.wall_millis())))
    }
}

/// Builds the server's side of TLS from PEM text. `client_ca`: clients must present a certificate that one of these
/// signed; without it any client is let in, unknown but encrypted.
///
/// # Errors
/// [`TlsError`]: what is wrong with the files.
pub fn server_config(
    env: &Env,
    certificates: &[u8],
    key: &[u8],
    client_ca: Option<&[u8]>,
) -> Result<Arc<ServerConfig>, TlsError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let chain = parse_certificates(certificates, "certificate")?;
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|source| TlsError::Pem { what: "private key", source })?;
    let builder = ServerConfig::builder_with_details(Arc::clone(&provider), Arc::new(Clock(env.clone())))
        .with_safe_default_protocol_versions()?;
    let builder = match client_ca {
        None => builder.with_no_client_auth(),
        Some(pem) => {
            let mut roots = RootCertStore::empty();
            for certificate in parse_certificates(pem, "client CA certificate")? {
                roots.add(certificate)?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build()?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    Ok(Arc::new(builder.with_single_cert(chain, key)?))
}

fn parse_certificates(pem: &[u8], what: &'static str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let found = found.map_err(|source| TlsError::Pem { what, source })?;
    if found.is_empty() {
        return Err(TlsError::Empty { what });
    }
    Ok(found)
}
