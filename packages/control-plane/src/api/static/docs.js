/* Shows this server's own document; keys that are typed in stay in this page. */
globalThis.SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#api",
  deepLinking: true,
  persistAuthorization: false,
  // Its validator badge would send the document to somebody else's server.
  validatorUrl: null,
});
