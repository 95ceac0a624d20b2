// Swagger UI over this gateway's own /openapi.json; the bundle comes with the fastapi-swagger package.
window.SwaggerUIBundle({ url: "/openapi.json", dom_id: "#docs", deepLinking: true });
