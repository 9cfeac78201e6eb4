//! Letting hosts in that have no certificate yet: a token that names the cluster, and one request over the nodes' port (RFC 0005).
//!
//! The joiner believes a server whose certificate chain leads to the CA that its token names; the server's service believes
//! the secret in the request. Bytes: docs/protocol/wire.md.

use crate::identity::{IdentityError, certified_node};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error as TlsError, RootCertStore, SignatureScheme,
};
use std::fmt;
use std::io;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_rustls::TlsConnector;
use xsan_env::runtime::BoxFuture;
use xsan_env::{Env, Stream};
use xsan_types::{ClusterId, crc32c};

/// What a client asks for in TLS that wants to join.
pub const JOIN_ALPN: &[u8] = b"xsan-join/1";
/// Largest request and largest answer.
pub const JOIN_BYTES_MAX: usize = 64 << 10;
/// What a joiner has, from its first byte to the answer.
pub(crate) const JOIN_FOR: Duration = Duration::from_secs(30);
/// Joiners served at a time.
pub(crate) const JOINS_MAX: usize = 8;

const PREFIX: &str = "xsan1-";
const FIELD_BYTES: usize = 16 + 32 + 8 + 16;
const TOKEN_BYTES: usize = FIELD_BYTES + 4;

/// Lets hosts in. Request and answer are bytes of its own format.
pub trait JoinService: Send + Sync + 'static {
    /// Answers one request of a host at `from`, which nothing is known of but what the request proves.
    fn join(&self, request: Vec<u8>, from: String) -> BoxFuture<'static, Vec<u8>>;
}

/// What a host shows to be let in. A secret.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    cluster: ClusterId,
    authority: [u8; 32],
    number: u64,
    secret: [u8; 16],
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JoinToken({} of {})", self.number, self.cluster)
    }
}

/// Why a text is no token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TokenError {
    /// It begins with something else.
    #[error("this is no join token: one begins with `xsan1-`")]
    Prefix,
    /// A part is missing, or a letter is wrong.
    #[error("the token is cut short or mistyped")]
    Damaged,
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    let digest = ring::digest::digest(&ring::digest::SHA256, bytes);
    digest.as_ref().try_into().expect("SHA-256 has 32 bytes")
}

impl JoinToken {
    /// A new token for the cluster whose CA certificate this is. Its secret comes from the operating system, never from a seed.
    ///
    /// # Errors
    /// Not a certificate.
    pub fn new(cluster: ClusterId, authority_pem: &str, number: u64) -> Result<Self, IdentityError> {
        let authority = CertificateDer::from_pem_slice(authority_pem.as_bytes())
            .map_err(|source| IdentityError::Pem { what: "CA certificate", source })?;
        let mut secret = [0; 16];
        let filled = ring::rand::SecureRandom::fill(&ring::rand::SystemRandom::new(), &mut secret);
        filled.map_err(|_| IdentityError::Random)?;
        Ok(Self { cluster, authority: sha256(&authority), number, secret })
    }

    /// The cluster it is of.
    #[must_use]
    pub fn cluster(&self) -> ClusterId {
        self.cluster
    }

    /// Its number: what it is known by.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.number
    }

    /// SHA-256 of its secret: what the cluster keeps of it.
    #[must_use]
    pub fn secret_hash(&self) -> [u8; 32] {
        sha256(&self.secret)
    }

    /// Its secret: what the request carries. The cluster hashes it, so that who reads the metadata cannot join.
    #[must_use]
    pub fn secret(&self) -> [u8; 16] {
        self.secret
    }

    /// The hash of a secret as the cluster keeps it.
    #[must_use]
    pub fn hash_of(secret: &[u8; 16]) -> [u8; 32] {
        sha256(secret)
    }
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = Vec::with_capacity(TOKEN_BYTES);
        bytes.extend_from_slice(&self.cluster.0.to_le_bytes());
        bytes.extend_from_slice(&self.authority);
        bytes.extend_from_slice(&self.number.to_le_bytes());
        bytes.extend_from_slice(&self.secret);
        bytes.extend_from_slice(&crc32c(&bytes).0.to_le_bytes());
        f.write_str(PREFIX)?;
        bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FromStr for JoinToken {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        let digits = text.trim().strip_prefix(PREFIX).ok_or(TokenError::Prefix)?.as_bytes();
        if digits.len() != 2 * TOKEN_BYTES || !digits.iter().all(u8::is_ascii_hexdigit) {
            return Err(TokenError::Damaged);
        }
        let byte = |pair: &[u8]| {
            pair.iter().fold(0, |byte, digit| byte << 4 | char::from(*digit).to_digit(16).unwrap_or(0) as u8)
        };
        let bytes: Vec<u8> = digits.chunks(2).map(byte).collect();
        let (fields, crc) = bytes.split_at(FIELD_BYTES);
        if crc != crc32c(fields).0.to_le_bytes() {
            return Err(TokenError::Damaged);
        }
        let mut rest = fields;
        Ok(Self {
            cluster: ClusterId(u128::from_le_bytes(take(&mut rest))),
            authority: take(&mut rest),
            number: u64::from_le_bytes(take(&mut rest)),
            secret: take(&mut rest),
        })
    }
}

/// The next `N` of bytes that were counted before.
fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let (first, tail) = rest.split_first_chunk::<N>().expect("all fields together are as long as was checked");
    *rest = tail;
    *first
}

/// Why a host could not ask to be let in.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JoinError {
    /// Nothing came in time.
    #[error("no answer in time")]
    Silent,
    /// The server is of another cluster than the token, or none of XSAN.
    #[error("it is not of the cluster that the token is for, or is no XSAN node ({0})")]
    Stranger(#[source] io::Error),
    /// The connection ended before the answer.
    #[error("the connection ended without an answer")]
    Ended(#[source] io::Error),
}

/// Asks to be let in: one request, one answer. The request is sent only to a node of the token's cluster.
///
/// # Errors
/// [`JoinError`]: with `Silent` and `Ended` the request may have been done; it is safe to repeat.
pub async fn join(
    env: &Env,
    stream: Stream,
    token: &JoinToken,
    request: &[u8],
    patience: Duration,
) -> Result<Vec<u8>, JoinError> {
    let connector = TlsConnector::from(Arc::new(client_config(env, token).map_err(JoinError::Stranger)?));
    let exchange = async {
        // Which node it is, is read from its certificate: the name asked for is not looked at.
        let name = ServerName::try_from("join.xsan.internal").expect("a DNS name");
        let mut stream = connector.connect(name, stream).await.map_err(JoinError::Stranger)?;
        put(&mut stream, request).await.map_err(JoinError::Ended)?;
        get(&mut stream).await.map_err(JoinError::Ended)
    };
    env.timeout(patience, exchange).await.ok_or(JoinError::Silent)?
}

/// Serves one joiner on a stream whose TLS is agreed on.
pub(crate) async fn serve<S>(mut stream: S, service: &dyn JoinService, from: String) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let request = get(&mut stream).await?;
    let answer = service.join(request, from).await;
    put(&mut stream, &answer).await?;
    stream.shutdown().await
}

async fn put<S: AsyncWrite + Unpin>(stream: &mut S, bytes: &[u8]) -> io::Result<()> {
    let length = u32::try_from(bytes.len()).ok().filter(|_| bytes.len() <= JOIN_BYTES_MAX);
    let length = length.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "too long"))?;
    stream.write_all(&length.to_le_bytes()).await?;
    stream.write_all(bytes).await?;
    stream.flush().await
}

async fn get<S: AsyncRead + Unpin>(stream: &mut S) -> io::Result<Vec<u8>> {
    let length = usize::try_from(stream.read_u32_le().await?).unwrap_or(usize::MAX);
    if length > JOIN_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "longer than a message of joining may be"));
    }
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).await?;
    Ok(bytes)
}

fn client_config(env: &Env, token: &JoinToken) -> io::Result<ClientConfig> {
    let (provider, clock) = crate::identity::provider_and_clock(env);
    let verifier = Arc::new(PinnedAuthority { token: token.clone(), provider: Arc::clone(&provider) });
    let mut config = ClientConfig::builder_with_details(provider, clock)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(io::Error::other)?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    config.alpn_protocols = vec![JOIN_ALPN.to_vec()];
    Ok(config)
}

/// Believes servers whose chain ends in the CA that a token names.
#[derive(Debug)]
struct PinnedAuthority {
    token: JoinToken,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for PinnedAuthority {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        let unknown = || TlsError::InvalidCertificate(CertificateError::UnknownIssuer);
        let authority = intermediates.iter().find(|one| sha256(one) == self.token.authority).ok_or_else(unknown)?;
        let mut roots = RootCertStore::empty();
        roots.add(authority.clone().into_owned())?;
        let node = certified_node(end_entity, self.token.cluster).map_err(|_| unknown())?;
        let name = crate::identity::server_name(self.token.cluster, node).ok_or_else(unknown)?;
        let builder =
            rustls::client::WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&self.provider));
        let verifier = builder.build().map_err(|error| TlsError::General(error.to_string()))?;
        verifier.verify_server_cert(end_entity, &[], &name, &[], now)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        Err(TlsError::General("TLS 1.2 is not spoken".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::Ca;

    fn token() -> JoinToken {
        JoinToken { cluster: ClusterId(0xabc), authority: [0x11; 32], number: 7, secret: [0x22; 16] }
    }

    #[test]
    fn a_tokens_text_is_what_it_always_was() {
        let ones = "11".repeat(32);
        let twos = "22".repeat(16);
        let text = format!("xsan1-bc0a{}{ones}0700000000000000{twos}", "00".repeat(14));
        let told = token().to_string();
        assert_eq!(told[..told.len() - 8], text);
        assert_eq!(told.parse(), Ok(token()));
    }

    #[test]
    fn a_mistyped_token_is_refused_as_such() {
        let text = token().to_string();
        assert_eq!(text[1..].parse::<JoinToken>(), Err(TokenError::Prefix));
        assert_eq!(text[..text.len() - 1].parse::<JoinToken>(), Err(TokenError::Damaged));
        assert_eq!("xsan1-ä".parse::<JoinToken>(), Err(TokenError::Damaged));
        for at in PREFIX.len()..text.len() {
            let mut wrong = text.clone().into_bytes();
            wrong[at] = if wrong[at] == b'0' { b'1' } else { b'0' };
            assert_eq!(String::from_utf8(wrong).expect("ASCII").parse::<JoinToken>(), Err(TokenError::Damaged));
        }
    }

    #[test]
    fn a_token_shows_its_secret_to_nobody_by_accident() {
        let ca = Ca::new(ClusterId(1)).expect("made");
        let token = JoinToken::new(ClusterId(1), ca.certificate_pem(), 5).expect("made");
        let other = JoinToken::new(ClusterId(1), ca.certificate_pem(), 5).expect("made");
        assert_ne!(token.secret(), other.secret());
        assert!(!format!("{token:?}").contains(&format!("{:02x}{:02x}", token.secret()[0], token.secret()[1])));
        assert_eq!(token.secret_hash(), JoinToken::hash_of(&token.secret()));
    }
}
