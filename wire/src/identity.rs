//! Certificates: a cluster's own CA, what it gives to nodes, and TLS that lets in nobody else.
//!
//! A node's certificate names node and cluster in one DNS name (`n7.CLUSTER.xsan.internal`, never looked up anywhere). The
//! client asks TLS for that name, so it talks to the node it wants or to nobody; the server reads it off the client's
//! certificate and compares it with what the handshake claims. The key is made on the node and never leaves it: the CA
//! is given the public half.
//!
//! Certificates do not expire: a storage cluster that stops after some years because nobody renewed a file, or
//! because a host booted with a wrong clock, has lost more than it won. A node's trust ends when the membership
//! removes it ([`crate::service::Services::with_admission`]).

use crate::join::JOIN_ALPN;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData, SignatureAlgorithm,
};
use rustls::client::Resumption;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::time_provider::TimeProvider;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;
use xsan_env::Env;
use xsan_types::{ClusterId, ErrorKind, NodeId};

/// ECDSA on P-256: 65 bytes of public key, spoken by every TLS library.
static ALGORITHM: &SignatureAlgorithm = &rcgen::PKCS_ECDSA_P256_SHA256;
/// Bytes of a public key: an uncompressed point.
pub const PUBLIC_KEY_BYTES: usize = 65;
const SUFFIX: &str = "xsan.internal";

/// Why an identity cannot be made or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// A key or certificate could not be made.
    #[error("cannot make a key or certificate")]
    Make(#[from] rcgen::Error),
    /// Not PEM, or nothing of the wanted kind in it.
    #[error("no usable {what} in the PEM text")]
    Pem {
        /// `CA certificate`, `certificate` or `private key`.
        what: &'static str,
        /// What the parser said.
        source: rustls::pki_types::pem::Error,
    },
    /// Certificate and key do not belong together, or are of a kind that is not supported.
    #[error("the certificates are not usable")]
    Refused(#[from] rustls::Error),
    /// The CA certificate cannot verify peers.
    #[error("the CA certificate is not usable")]
    Verifier(#[from] rustls::server::VerifierBuilderError),
    /// Not an uncompressed point of P-256.
    #[error("not a public key of a node")]
    PublicKey,
    /// The operating system gives no random bytes.
    #[error("the operating system gives no random bytes")]
    Random,
    /// A certificate without a node's name in it.
    #[error("the certificate is not that of a node of this cluster")]
    NoNode,
}

impl IdentityError {
    /// All are wrong configuration.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        ErrorKind::Invalid
    }
}

/// The name of a node in its certificate.
fn node_name(cluster: ClusterId, node: NodeId) -> String {
    format!("n{}.{cluster}.{SUFFIX}", node.0)
}

/// The node of a name made by [`node_name`] for that cluster.
fn named_node(name: &str, cluster: ClusterId) -> Option<NodeId> {
    let label = name.strip_suffix(&format!(".{cluster}.{SUFFIX}"))?;
    let node: u32 = label.strip_prefix('n')?.parse().ok()?;
    // Only the one spelling that `node_name` has.
    (node_name(cluster, NodeId(node)) == name).then_some(NodeId(node))
}

/// A cluster's certificate authority. Its private key may sign a node into the cluster: keep it where the cluster is administered.
pub struct Ca {
    cluster: ClusterId,
    key: KeyPair,
    certificate_pem: String,
}

impl fmt::Debug for Ca {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ca({})", self.cluster)
    }
}

impl Ca {
    /// Makes the CA of a new cluster.
    ///
    /// # Errors
    /// [`IdentityError::Make`].
    pub fn new(cluster: ClusterId) -> Result<Self, IdentityError> {
        let key = KeyPair::generate_for(ALGORITHM)?;
        let certificate_pem = Self::params(cluster).self_signed(&key)?.pem();
        Ok(Self { cluster, key, certificate_pem })
    }

    /// A CA from what [`Ca::key_pem`] and [`Ca::certificate_pem`] gave.
    ///
    /// # Errors
    /// [`IdentityError::Make`]: not a private key.
    pub fn from_pem(cluster: ClusterId, key: &str, certificate: &str) -> Result<Self, IdentityError> {
        let key = KeyPair::from_pem(key)?;
        Ok(Self { cluster, key, certificate_pem: certificate.to_owned() })
    }

    /// The same for the same cluster, so that a CA needs nothing but its key to sign.
    fn params(cluster: ClusterId) -> CertificateParams {
        let mut name = DistinguishedName::new();
        name.push(DnType::CommonName, format!("XSAN cluster {cluster}"));
        let mut params = CertificateParams::default();
        params.distinguished_name = name;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params
    }

    /// The private key; a secret.
    #[must_use]
    pub fn key_pem(&self) -> String {
        self.key.serialize_pem()
    }

    /// The certificate that all nodes trust; public.
    #[must_use]
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// Signs the public key of a node: PEM text of its certificate. That the node has the private half is proved by every
    /// TLS handshake, so the request needs no signature.
    ///
    /// # Errors
    /// [`IdentityError::PublicKey`], [`IdentityError::Make`].
    pub fn issue(&self, node: NodeId, public_key: &[u8]) -> Result<String, IdentityError> {
        if public_key.len() != PUBLIC_KEY_BYTES || public_key[0] != 4 {
            return Err(IdentityError::PublicKey);
        }
        let mut params = CertificateParams::new(vec![node_name(self.cluster, node)])?;
        let mut name = DistinguishedName::new();
        name.push(DnType::CommonName, format!("XSAN node {}", node.0));
        params.distinguished_name = name;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let issuer = Issuer::new(Self::params(self.cluster), &self.key);
        Ok(params.signed_by(&PublicKey(public_key), &issuer)?.pem())
    }
}

struct PublicKey<'a>(&'a [u8]);

impl PublicKeyData for PublicKey<'_> {
    fn der_bytes(&self) -> &[u8] {
        self.0
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        ALGORITHM
    }
}

/// A node's key, made on the node.
pub struct NodeKey(KeyPair);

impl fmt::Debug for NodeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NodeKey")
    }
}

impl NodeKey {
    /// A new key.
    ///
    /// # Errors
    /// [`IdentityError::Make`].
    pub fn new() -> Result<Self, IdentityError> {
        Ok(Self(KeyPair::generate_for(ALGORITHM)?))
    }

    /// The public half, for [`Ca::issue`]: [`PUBLIC_KEY_BYTES`] bytes.
    #[must_use]
    pub fn public(&self) -> &[u8] {
        self.0.public_key_raw()
    }

    /// PEM text of the private key; a secret.
    #[must_use]
    pub fn pem(&self) -> String {
        self.0.serialize_pem()
    }
}

/// The clock for certificates: the world's, not the process's.
#[derive(Debug)]
struct Clock(Env);

impl TimeProvider for Clock {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(Duration::from_millis(self.0.wall_millis())))
    }
}

/// Both sides of TLS for one node: mutual, 1.3 only, one CA.
pub struct Tls {
    cluster: ClusterId,
    pub(crate) client: Arc<ClientConfig>,
    pub(crate) server: Arc<ServerConfig>,
    /// For hosts that have no certificate yet.
    pub(crate) join: Arc<ServerConfig>,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tls({})", self.cluster)
    }
}

impl Tls {
    /// From PEM texts: the CA's certificate, this node's certificate and its private key.
    ///
    /// # Errors
    /// [`IdentityError`]: what is wrong with them.
    pub fn new(
        env: &Env,
        cluster: ClusterId,
        ca: &str,
        certificate: &str,
        key: &str,
    ) -> Result<Arc<Self>, IdentityError> {
        let pem = |what| move |source| IdentityError::Pem { what, source };
        let ca = CertificateDer::from_pem_slice(ca.as_bytes()).map_err(pem("CA certificate"))?;
        let certificate = CertificateDer::from_pem_slice(certificate.as_bytes()).map_err(pem("certificate"))?;
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(pem("private key"))?;
        // A wrong file is found here, not by the first peer.
        certified_node(&certificate, cluster)?;
        let mut roots = RootCertStore::empty();
        roots.add(ca.clone())?;
        let roots = Arc::new(roots);
        let (provider, clock) = (provider(), Arc::new(Clock(env.clone())));
        let client = client_config(&provider, &clock, &roots, certificate.clone(), key.clone_key())?;
        let join = join_config(&provider, &clock, vec![certificate.clone(), ca], key.clone_key())?;
        let server = server_config(&provider, &clock, &roots, certificate, key)?;
        Ok(Arc::new(Self { cluster, client: Arc::new(client), server: Arc::new(server), join: Arc::new(join) }))
    }

    /// The name that the certificate of `node` must have.
    pub(crate) fn name_of(&self, node: NodeId) -> Option<ServerName<'static>> {
        server_name(self.cluster, node)
    }

    /// The node that a verified certificate belongs to.
    pub(crate) fn node_of(&self, certificates: Option<&[CertificateDer<'_>]>) -> Result<NodeId, IdentityError> {
        let certificate = certificates.and_then(<[_]>::first).ok_or(IdentityError::NoNode)?;
        certified_node(certificate, self.cluster)
    }
}

pub(crate) fn certified_node(certificate: &CertificateDer<'_>, cluster: ClusterId) -> Result<NodeId, IdentityError> {
    let certificate = webpki::EndEntityCert::try_from(certificate).map_err(|_| IdentityError::NoNode)?;
    certificate.valid_dns_names().find_map(|name| named_node(name, cluster)).ok_or(IdentityError::NoNode)
}

/// What every configuration is made of.
pub(crate) fn provider_and_clock(env: &Env) -> (Arc<CryptoProvider>, Arc<dyn TimeProvider>) {
    (provider(), Arc::new(Clock(env.clone())))
}

/// The name that the certificate of `node` must have.
pub(crate) fn server_name(cluster: ClusterId, node: NodeId) -> Option<ServerName<'static>> {
    ServerName::try_from(node_name(cluster, node)).ok()
}

/// AES-128 first: as safe here as AES-256, with ten rounds instead of fourteen for bytes that every guest write pays for.
fn provider() -> Arc<CryptoProvider> {
    use ring::cipher_suite::{TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256};
    let cipher_suites = vec![TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256];
    Arc::new(CryptoProvider { cipher_suites, ..ring::default_provider() })
}

fn client_config(
    provider: &Arc<CryptoProvider>,
    clock: &Arc<Clock>,
    roots: &Arc<RootCertStore>,
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
) -> Result<ClientConfig, IdentityError> {
    let clock: Arc<dyn TimeProvider> = Arc::<Clock>::clone(clock);
    let mut config = ClientConfig::builder_with_details(Arc::clone(provider), clock)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(Arc::clone(roots))
        .with_client_auth_cert(vec![certificate], key)?;
    // Connections are few and long: each proves its certificate anew.
    config.resumption = Resumption::disabled();
    Ok(config)
}

fn server_config(
    provider: &Arc<CryptoProvider>,
    clock: &Arc<Clock>,
    roots: &Arc<RootCertStore>,
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
) -> Result<ServerConfig, IdentityError> {
    let clock: Arc<dyn TimeProvider> = Arc::<Clock>::clone(clock);
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::clone(roots), Arc::clone(provider)).build()?;
    let mut config = ServerConfig::builder_with_details(Arc::clone(provider), clock)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![certificate], key)?;
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(config)
}

/// For a client without a certificate: it is shown the CA's, which its token names.
fn join_config(
    provider: &Arc<CryptoProvider>,
    clock: &Arc<Clock>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<ServerConfig, IdentityError> {
    let clock: Arc<dyn TimeProvider> = Arc::<Clock>::clone(clock);
    let mut config = ServerConfig::builder_with_details(Arc::clone(provider), clock)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![JOIN_ALPN.to_vec()];
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nodes_name_is_read_back_from_its_certificate_and_only_in_its_cluster() {
        let (cluster, other) = (ClusterId(0xabc), ClusterId(0xabd));
        let ca = Ca::new(cluster).expect("made");
        // As after a restart: from what was stored.
        let ca = Ca::from_pem(cluster, &ca.key_pem(), ca.certificate_pem()).expect("read");
        let key = NodeKey::new().expect("made");
        let pem = ca.issue(NodeId(42), key.public()).expect("issued");
        let der = CertificateDer::from_pem_slice(pem.as_bytes()).expect("a certificate");
        assert_eq!(certified_node(&der, cluster).expect("named"), NodeId(42));
        assert!(certified_node(&der, other).is_err());
        let ca_der = CertificateDer::from_pem_slice(ca.certificate_pem().as_bytes()).expect("a certificate");
        assert!(certified_node(&ca_der, cluster).is_err(), "the CA is no node");
    }

    #[test]
    fn only_the_one_spelling_of_a_name_counts() {
        let cluster = ClusterId(1);
        assert_eq!(named_node(&node_name(cluster, NodeId(7)), cluster), Some(NodeId(7)));
        for wrong in ["n07", "n+7", "7", "n", "n7.n7", "n99999999999"] {
            assert_eq!(named_node(&format!("{wrong}.{cluster}.{SUFFIX}"), cluster), None, "{wrong}");
        }
    }

    #[test]
    fn what_is_no_public_key_is_not_signed() {
        let ca = Ca::new(ClusterId(1)).expect("made");
        for wrong in [&[][..], &[4; 64], &[2; 65]] {
            assert!(matches!(ca.issue(NodeId(1), wrong), Err(IdentityError::PublicKey)));
        }
    }
}
